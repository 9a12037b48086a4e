"""Where an adapter comes from: the run that trained it, as its folder tells later readers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

_KINDS: dict[Any, tuple[Any, str]] = {
    str: (str, "a text"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a reader must know to repeat, compare or evaluate an adapter.

    Attributes:
        domains: its domains in order; figures named `env{i}_...` speak of the i-th.
        held_out: the domain that was not trained on, to be tested on.
        trial_seed: seed of the split of every domain.
        holdout_fraction: share of every domain's `out` split.
        seed: of initialisation, order, augmentation and noise.
        data_hash: hash of all images and their classes.
        split_hash: hash of which of them are in which split.
        processes: how many processes trained it together.
        averaged: the adapters it is a mean of; empty for one that was trained.
        also_held_out: further domains that were not trained on, for cross-validation.
        weights: of the base: `pretrained`, `random` (drawn by `seed` for as many classes), or the
            file they were read from; empty if not on record.
        decode: what decoded the images (`data.decode`).
        truncated: what was done with incomplete ones (`data.truncated`).
        dataset_name: the shard set's own name; empty if it has none.
        precision: of the run's arithmetic, `fp32` or `bf16`; empty if not on record.
        compiled: what torch's compiler had made faster, `blocks`; empty if nothing.
        group_by: pattern whose groups the splits keep together; empty for DomainBed's splits.
        alpha: how much of the way from the start of the training to its end the adapter went; 1 is
            all of it.
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
    dataset_name: str = ""
    precision: str = ""
    compiled: str = ""
    group_by: str = ""
    alpha: float = 1.0

    @property
    def withheld(self) -> tuple[str, ...]:
        """All domains that were not trained on, the target first."""
        return (self.held_out, *self.also_held_out)

    @property
    def shown_dataset(self) -> str:
        """What to call the data."""
        return self.dataset_name or self.dataset

    def plain(self) -> dict[str, Any]:
        """As JSON stores it."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        later = (
            "dataset_name",
            "precision",
            "compiled",
            "group_by",
            "alpha",
        )  # at their defaults, the file is as before they existed
        left_out = {f.name: f.default for f in fields(self) if f.name in later}
        return {k: v for k, v in plain.items() if k not in later or v != left_out[k]}


def origin_from(content: Mapping[str, Any]) -> Origin:
    """The inverse of `Origin.plain`.

    Raises `ValueError`: a field is missing, unknown or of another type.
    """
    lists = ("domains", "averaged", "also_held_out")
    try:
        texts = {name: tuple(map(str, content[name])) for name in lists if name in content}
        if wrong := [name for name in texts if not isinstance(content[name], list)]:
            raise TypeError(f"{wrong[0]} is no list")
        origin = Origin(**{**content, **texts})
    except TypeError as error:
        raise ValueError(f"origin: {error}") from error
    for field in fields(Origin):
        value, (kind, legal) = getattr(origin, field.name), _KINDS.get(field.type, (object, ""))
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"origin: {field.name} {value!r}; must be {legal}")
        if isinstance(value, int | float) and not 0 <= value < 2**63:
            raise ValueError(f"origin: {field.name} {value!r}; must be from 0 to below 2^63")
    return origin
