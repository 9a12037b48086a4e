"""Where an adapter comes from: the run that trained it, as its folder tells later readers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a reader must know to repeat, compare or evaluate an adapter.

    Attributes:
        dataset: name of the dataset.
        domains: its domains in order; figures named `env{i}_...` speak of the i-th.
        held_out: the domain that was not trained on, to be tested on.
        trial_seed: seed of the split of every domain.
        holdout_fraction: share of every domain's `out` split.
        seed: of initialisation, order, augmentation and noise.
        data_hash: hash of all images and their classes.
        split_hash: hash of which of them are in which split.
        command: the command line that trained it.
        processes: how many processes trained it together.
        averaged: the adapters it is a mean of; empty for one that was trained.
        also_held_out: further domains that were not trained on, for cross-validation.
        weights: of the base: `pretrained`, `random` (drawn by `seed` for as many classes), or the
            file they were read from; empty if not on record.
        decode: what decoded the images (`data.decode`).
        truncated: what was done with incomplete ones (`data.truncated`).
    """

    dataset: str
    domains: tuple[str, ...]
    held_out: str
    trial_seed: int
    holdout_fraction: float
    seed: int
    data_hash: str
    split_hash: str
    command: str
    processes: int = 1
    averaged: tuple[str, ...] = ()
    also_held_out: tuple[str, ...] = ()
    weights: str = ""
    decode: str = "auto"
    truncated: str = "keep"

    @property
    def withheld(self) -> tuple[str, ...]:
        """All domains that were not trained on, the target first."""
        return (self.held_out, *self.also_held_out)

    def plain(self) -> dict[str, Any]:
        """As JSON stores it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def origin_from(content: Mapping[str, Any]) -> Origin:
    """The inverse of `Origin.plain`.

    Raises:
        ValueError: a field is missing, unknown or of another type.
    """
    try:
        origin = Origin(**content)
        numbers = {name: getattr(origin, name) for name in ("trial_seed", "seed", "processes")}
        if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers.values()):
            raise ValueError(f"origin: {numbers} must be whole numbers")
        if not isinstance(origin.holdout_fraction, float | int):
            raise ValueError(f"origin: holdout_fraction {origin.holdout_fraction!r} is no number")
        texts = {name: getattr(origin, name) for name in ("weights", "decode", "truncated")}
        if any(not isinstance(text, str) for text in texts.values()):
            raise ValueError(f"origin: {texts} must be texts")
        names = ("domains", "averaged", "also_held_out")
        lists = {name: tuple(map(str, getattr(origin, name))) for name in names}
        return Origin(**{**content, **lists})
    except TypeError as error:
        raise ValueError(f"origin: {error}") from error
