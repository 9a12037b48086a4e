"""What adapters say to images: the most probable classes, and the route of every token.

Backbone, ensemble, arithmetic and images are those of `trainer.evaluate`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moa import recorded_routes
from shards import Batch, DataConfig, Decoder, finish_images, loader_transform
from shards.stream.batches import BatchLoader, rank_range
from shards.stream.worker_faults import check_shared_memory
from trainer.evaluate.combine import Average, average, models_on, ready
from trainer.evaluate.evaluator import evaluating
from trainer.evaluate.job import dtype_of
from trainer.evaluate.members import Member, base_of, of_size, read_members
from trainer.evaluate.predictions import Predictions
from trainer.predict.images import Images, images_at, load_batch
from trainer.prepare.backbone import Backbone
from trainer.process.device import use_device
from trainer.process.errors import ConfigError
from trainer.process.stopping import shielded
from trainer.process.world import ALONE, World


@dataclass(frozen=True)
class Prediction:
    """What was said to one image.

    Attributes:
        image: path of the file, or key in the shard set.
        classes: names of the most probable ones, the first one first; none for an unusable image.
        probabilities: theirs, in [0, 1].
        problem: what is wrong with the image; empty if nothing.
        routes: adapter -> layer -> for each token the number of its expert, or where it goes to
            several their list, the largest gate first; None unless asked for.
    """

    image: str
    classes: Sequence[str]
    probabilities: Sequence[float]
    problem: str = ""
    routes: Mapping[str, Mapping[str, Sequence[Any]]] | None = None


@dataclass(frozen=True)
class Predicting:
    """The predictions of this process's images, made while one iterates over them."""

    images: Images
    members: Sequence[Member]
    backbone: Backbone
    config: DataConfig
    dtype: torch.dtype
    world: World
    top_k: int
    average: Average
    routes: bool
    batch: int

    def __iter__(self) -> Iterator[Prediction]:
        device, data_config = use_device(self.world), self.members[0].info.data_config
        models = ready(models_on(self.backbone.model, self.members), self.dtype, device)
        for batch in shielded(self._loader(data_config, device)):
            images = finish_images(batch, device, data_config).to(self.dtype)
            yield from self._said(models, images, batch)

    def _loader(self, data_config: Mapping[str, Any], device: torch.device) -> BatchLoader:
        config, step = self.config, self.batch
        size = step * math.prod(data_config["input_size"])
        check_shared_memory(size, config.workers, self.world.local_size)
        decoder = Decoder(config.decode, config.truncated, config.max_pixels)
        mine = rank_range(len(self.images.names), self.world.rank, self.world.size)
        return BatchLoader(
            partial(load_batch, self.images, loader_transform(data_config, "none"), decoder),
            [mine[start : start + step] for start in range(0, len(mine), step)],
            reported=set(self.images.names),  # bad ones are told with the predictions
            workers=config.workers, pin_memory=device.type == "cuda",
        )  # fmt: skip

    def _said(self, models: nn.ModuleList, images: Tensor, batch: Batch) -> Iterator[Prediction]:
        """The predictions of one batch, whose `images` are on the models' device."""
        with evaluating(*models), ExitStack() as stack:
            gates = [stack.enter_context(recorded_routes(m)) for m in models] if self.routes else []
            said = [Predictions(model(images).float().cpu(), batch.labels) for model in models]
        logits = average(said, self.average).logits if len(said) > 1 else said[0].logits.double()
        shares, order = logits.softmax(1).sort(dim=1, descending=True, stable=True)
        best = zip(*(each[:, : self.top_k].tolist() for each in (shares, order)), strict=True)
        bad = {sample.key: sample for sample in batch.bad}
        routes = [_experts(*pair, len(images)) for pair in zip(self.members, gates, strict=False)]
        for row, (probabilities, numbers) in enumerate(best):
            name = self.images.names[batch.first_slot + row]
            problem = bad.get(name)
            if problem is not None and problem.reason != "truncated":
                yield Prediction(name, [], [], problem.detail)
                continue
            classes = [self.members[0].info.classes[number] for number in numbers]
            known = zip(self.members, routes, strict=False)
            mine = {member.label: found[row] for member, found in known} or None
            told = "incomplete, used as far as it goes" if problem else ""
            yield Prediction(name, classes, probabilities, told, mine)


def _experts(member: Member, gates: Mapping[str, Tensor], images: int) -> list[dict[str, Any]]:
    """For each image layer -> its tokens' experts, from the gates [B, ..., E] of the layers."""
    found: list[dict[str, Any]] = [{} for _ in range(images)]
    kept = member.info.moa.experts_kept
    for layer, of_tokens in gates.items():
        tokens = of_tokens.reshape(images, -1, of_tokens.shape[-1])
        order = tokens.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
        numbers = (order[..., 0] if kept == 1 else order).tolist()
        for row, experts in zip(found, numbers, strict=True):
            row[layer] = experts
    return found


def predict(
    images: str | Path | Sequence[str | Path],
    adapters: str | Sequence[str | Path],
    *,
    top_k: int = 5,
    average: Average = "probabilities",
    routes: bool = False,
    batch: int = 128,
    precision: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    world: World = ALONE,
    **data: Any,
) -> Predicting:
    """What adapters, several as an ensemble, say to images without labels.

    All is checked at once, and computed while one iterates over the result. `images` is a folder, a
    list, a shard set or an image, or the paths of image files; `data` are `workers`, `decode`,
    `truncated`, `max_pixels`, `cache_dir` of `DataConfig`. Everything means what the command's flag
    of its name does, and None what the adapters say. `world` is this process among those that share
    out the images.

    Raises:
        ConfigError, DataConfigError, MissingAdapterError: something given cannot work.
        AdapterError, CheckpointError, DamagedDataError: something read is damaged.
    """
    members = read_members([adapters] if isinstance(adapters, str) else list(map(str, adapters)))
    methods = ", ".join(dict.fromkeys(member.info.moa.method for member in members))
    unrouted = routes and not any(member.info.moa.routed for member in members)
    where = str(images) if isinstance(images, str | Path) else list(map(str, images))
    known = next((m.info.origin for m in members if m.info.origin is not None), None)
    own = {} if known is None else {"decode": known.decode, "truncated": known.truncated}
    given = {name: value for name, value in data.items() if value is not None}
    root = where if isinstance(where, str) else "."
    config = DataConfig(**(own | given | {"dataset": "folder", "root": root}))
    rules = (
        (f"--top_k {top_k}: must be 1 or more", top_k < 1),
        (f"--batch {batch}: must be 1 or more", batch < 1),
        (f"--routes: {methods} routes no tokens; leave it out", unrouted),
    )
    if problems := [line for line, wrong in rules if wrong] + config.problems():
        raise ConfigError("\n".join(problems))
    classes = len(members[0].info.classes)
    return Predicting(
        images_at(where, config), [of_size(m, image_size) for m in members],
        base_of(members[0], weights, image_size), config,
        dtype_of(members, precision), world, min(top_k, classes), average, routes, batch,
    )  # fmt: skip
