"""DomainBed's random search: settings drawn from the number of a set of hyper-parameters.

A draw follows from that number and DomainBed's name of the setting alone, so that every method,
held-out domain and seed gets the same learning rate under the same number, here and there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.config.run_config import RunConfig, flat

if TYPE_CHECKING:
    from numpy.random import RandomState

FACTS = ("data.dataset", "moa.method", "objective.name")
"""Settings that decide what is drawn, and from which distribution."""
ONE = ("lora", "kadaptation")
SEVERAL = ("multi_lora", "moa_lora", "moa_kron")


@dataclass(frozen=True)
class Draw:
    """How a setting is drawn.

    Attributes:
        name: what DomainBed calls it, or for what it has not, a name of ours.
        only: datasets, methods or objectives with which it is drawn so; empty for all.
    """

    setting: str
    name: str
    value: Callable[["RandomState"], Any]
    only: tuple[str, ...] = ()


def _ten_to(low: float, high: float) -> Callable[["RandomState"], float]:
    return lambda random: float(10 ** random.uniform(low, high))


def _whole(base: int, low: float, high: float) -> Callable[["RandomState"], int]:
    return lambda random: int(base ** random.uniform(low, high))


def _one_of(*values: Any) -> Callable[["RandomState"], Any]:
    return lambda random: values[random.choice(len(values))]


DRAWS = (
    Draw("optim.lr", "lr", _ten_to(-5, -3.5)),
    Draw("optim.weight_decay", "weight_decay", _ten_to(-6, -2)),
    Draw("train.batch_per_domain", "batch_size", _whole(2, 3, 5.5)),
    Draw("train.batch_per_domain", "batch_size", _whole(2, 3, 5), ("domainnet",)),
    Draw("model.dropout", "vit_dropout", _one_of(0.0, 0.1, 0.5)),
    Draw("objective.groupdro_eta", "groupdro_eta", _ten_to(-3, -1), ("groupdro",)),
    Draw("objective.vrex_lambda", "vrex_lambda", _ten_to(-1, 5), ("vrex",)),
    Draw("objective.vrex_anneal", "vrex_penalty_anneal_iters", _whole(10, 0, 4), ("vrex",)),
    Draw("objective.irm_lambda", "irm_lambda", _ten_to(-1, 5), ("irm",)),
    Draw("objective.irm_anneal", "irm_penalty_anneal_iters", _whole(10, 0, 4), ("irm",)),
    Draw("objective.coral_gamma", "mmd_gamma", _ten_to(-1, 1), ("coral",)),
    Draw("objective.mmd_gamma", "mmd_gamma", _ten_to(-1, 1), ("mmd",)),
    Draw("objective.mixup_alpha", "mixup_alpha", _ten_to(-1, 1), ("mixup",)),
    Draw("moa.ranks", "adapter_ranks", _one_of([1], [2], [4], [8]), ONE),
    Draw("moa.ranks", "adapter_ranks",
         _one_of([1, 2, 4, 8], [2, 4, 8, 16], [2, 2, 2, 2], [4, 4, 4, 4]), SEVERAL),
    Draw("moa.targets", "adapter_targets",
         _one_of(["attn.qkv"], ["attn.qkv", "attn.proj"]), ONE + SEVERAL),
)  # fmt: skip
"""All draws; of one setting the last that fits."""


def drawn(number: int, *facts: str) -> dict[str, Any]:
    """The settings that a number > 0 draws for a dataset, a method and an objective."""
    from numpy.random import RandomState  # here: `--help` need not wait for it

    from shards.stream.split import seed_hash

    return {
        draw.setting: draw.value(RandomState(seed_hash(number, draw.name)))
        for draw in DRAWS
        if not draw.only or {*draw.only} & {*facts}
    }


def in_words(config: RunConfig) -> str:
    """What `hparams_seed` drew of a configuration, and what was given instead."""
    values = flat(config)
    draws = drawn(config.hparams_seed, *(values[name] for name in FACTS))
    kept = [f"{name} {values[name]}" for name, value in draws.items() if values[name] == value]
    given = [f"{name} {values[name]}" for name, value in draws.items() if values[name] != value]
    return f"drew {', '.join(kept) or 'nothing'}" + (f"; given: {', '.join(given)}" * bool(given))
