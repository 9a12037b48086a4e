"""What an objective sees of a batch, what it is, and whether a run can have it.

Letters: N images of the global batch, m of each of D source domains, n of them on this process;
C classes, F width of the features. An objective is a function of the whole batch that no process
holds: sums over it travel (`Seen.total`), and it is computed alike everywhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config.objective import ObjectiveConfig
from trainer.config.run_config import RunConfig
from trainer.process.errors import ConfigError

State = Mapping[str, Tensor]
"""What an objective carries from step to step: small fp32 vectors, kept in checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """This process's part of the global batch: the images of a run of slots.

    In slot s stands image s div D of domain s mod D (`shards.stream.mixing`).
    """

    scores: Tensor
    """[n, C], fp32"""
    labels: Tensor
    """int64 [n]"""
    losses: Tensor
    """[n], cross-entropy of each image"""
    slots: Tensor
    """int64 [n], places in the global batch"""
    sources: int
    """D"""
    each: int
    """m"""
    total: Callable[[Tensor], Tensor]
    """the sum over all processes; in backward the sum of their gradients"""
    features: Tensor | None = None
    """[n, F], fp32, what the head receives; only for objectives that ask"""

    @property
    def domains(self) -> Tensor:
        """Number of each image's source domain, int64 [n]."""
        return self.slots % self.sources

    @property
    def numbers(self) -> Tensor:
        """Which of its domain's m images each is, int64 [n]."""
        return self.slots // self.sources

    def members(self, dtype: torch.dtype) -> Tensor:
        """[D, n]: 1 where an image is of a domain, else 0; a product with it sums by domain."""
        numbers = torch.arange(self.sources, device=self.slots.device)
        return (self.domains == numbers[:, None]).to(dtype)

    def sums(self, values: Tensor) -> Tensor:
        """Sums over each domain's images in the global batch: [n, ...] to [D, ...]."""
        own = self.members(values.dtype) @ values.flatten(1)
        return self.total(own.view(-1, *values.shape[1:]))

    def means(self, values: Tensor) -> Tensor:
        """Means over each domain's images in the global batch: [n, ...] to [D, ...]."""
        return self.sums(values) / self.each

    def domain_losses(self) -> Tensor:
        """[D], the cross-entropy of each domain."""
        return self.means(self.losses[:, None])[:, 0]

    def gathered(self, values: Tensor) -> Tensor:
        """[n, ...] of all processes, by slot: [N, ...]. The batch itself travels; rarely needed."""
        whole = values.new_zeros(self.sources * self.each, *values.shape[1:])
        return self.total(whole.index_copy(0, self.slots, values))


class Outcome(NamedTuple):
    """What is to be minimised, and the rest."""

    loss: Tensor
    """of the global batch, alike on all processes; of an objective that `is_mean` of this part"""
    penalty: Tensor | None = None
    """what stands in rows beside it, before its weight"""
    state: State = MappingProxyType({})
    """for the next step, if this one is applied"""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A function of a batch, and what a run must know of it."""

    function: Callable[[Seen, int, State, ObjectiveConfig], Outcome]
    """of the batch, the step, the state and the settings"""
    is_mean: bool = False
    """a mean over images, so that each micro-batch can be done by itself"""
    needs_features: bool = False
    has_penalty: bool = False
    mixes: bool = False
    """images are mixed before the model sees them (`trainer.objectives.mixup`)"""
    begin: Callable[[int], State] = lambda sources: {}
    """the state before the first step, for D domains"""
    restarts: Callable[[int, ObjectiveConfig], bool] = lambda step, config: False
    """whether Adam begins anew in a step, since the objective jumps there"""
    least_sources: int = 2
    least_images: int = 1
    """of each domain"""
    most_images: int | None = None
    """in the global batch"""


def objective_of(config: ObjectiveConfig) -> Objective:
    """The objective of a file of this folder, by the file's name."""
    found: Objective = import_module(f"trainer.objectives.{config.name}").OBJECTIVE
    return found


def check_objective(config: RunConfig, sources: int, sharded: bool) -> None:
    """Raises `ConfigError`: the batch of so many source domains is none for the objective.

    Or ZeRO-3 shards the parameters, with sharpness-aware steps.
    """
    settings, each = config.objective, config.train.batch_per_domain
    name, objective = settings.name, objective_of(settings)
    problems = []
    if sources < objective.least_sources:
        problems.append(
            f"objective.name: {name} compares source domains, and there is {sources}; hold out "
            "fewer domains, or use --objective.name erm"
        )
    if each < objective.least_images:
        problems.append(
            f"objective.name: {name} needs {objective.least_images} images of each domain in a "
            f"batch, train.batch_per_domain is {each}; raise it"
        )
    if objective.most_images is not None and sources * each > objective.most_images:
        problems.append(
            f"objective.name: {name} compares all pairs of at most {objective.most_images} images, "
            f"the global batch has {sources * each} ({sources} source domains x {each}); lower "
            f"train.batch_per_domain to {objective.most_images // sources} or less, or use "
            "--objective.name coral"
        )
    if settings.sam and sharded:
        problems.append(
            f"objective.sam: {settings.sam} with ZeRO-3, which holds no parameter whole to move it "
            "and to put it back; use --ds_config ds_configs/zero2.json, or --objective.sam 0"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def passes(config: RunConfig) -> tuple[int, int]:
    """Passes of forward and backward in a step, and forwards without a graph."""
    whole = 2 if config.objective.sam else 1
    ahead = config.train.accumulation > 1 and not objective_of(config.objective).is_mean
    return whole, whole * ahead
