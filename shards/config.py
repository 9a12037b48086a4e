"""The data section of a run's configuration."""

from dataclasses import dataclass
from typing import Literal, get_args

from shards.datasets import DATASETS, dataset_spec
from shards.errors import DataConfigError

Augment = Literal["auto", "domainbed", "no_flip", "none"]
ResolvedAugment = Literal["domainbed", "no_flip", "none"]
SamplingMode = Literal["permutation", "replacement"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data to train on, how to hold out, order and augment it."""

    dataset: str = "digits"
    """Name of the dataset: `digits` is embedded, `folder` is any shard set of your own."""
    root: str | None = None
    """Folder of the shard set (made by `python -m shards.writer`); unset: the embedded data, built
    on first use."""
    held_out: str | None = None
    """Domain to leave out of training and to test on; unset: the dataset's last domain."""
    mode: SamplingMode = "permutation"
    """Order within a domain: `permutation` shows every image once per epoch, `replacement` draws
    independently as DomainBed does."""
    workers: int = 0
    """Loader processes per rank; 0 loads in the training process. Changes speed, never the data."""
    holdout_fraction: float = 0.2
    """Share of every domain kept for validation (DomainBed: 0.2)."""
    augment: Augment = "auto"
    """Training augmentation: `domainbed`, the same without mirroring (`no_flip`), or `none`; `auto`
    mirrors only where a mirrored image keeps its class."""

    def problems(self) -> list[str]:
        """List everything that is out of range.

        Returns:
            One line per problem, each starting with the key; empty when all is well.
        """
        found = []
        try:
            dataset_spec(self.dataset)
        except DataConfigError as error:
            found.append(str(error))
        else:
            if self.root is None and self.dataset != "digits":
                found.append(
                    f"data.root is not set: dataset {self.dataset!r} is not embedded; give the "
                    "folder of its shard set (made by `python -m shards.writer`)"
                )
        if self.mode not in get_args(SamplingMode):
            found.append(_choice("data.mode", self.mode, get_args(SamplingMode)))
        if self.workers < 0:
            found.append(f"data.workers = {self.workers}: must be 0 or more")
        if not 0 <= self.holdout_fraction < 1:
            found.append(
                f"data.holdout_fraction = {self.holdout_fraction}: must lie in [0, 1); "
                "DomainBed uses 0.2"
            )
        if self.augment not in get_args(Augment):
            found.append(_choice("data.augment", self.augment, get_args(Augment)))
        return found

    def resolved_augment(self) -> ResolvedAugment:
        """Give the augmentation with `auto` replaced by what suits the dataset.

        Returns:
            `domainbed`, `no_flip` or `none`.
        """
        if self.augment != "auto":
            return self.augment
        spec = DATASETS.get(self.dataset)
        return "domainbed" if spec is None or spec.horizontal_flip else "no_flip"


def _choice(key: str, value: object, legal: tuple[str, ...]) -> str:
    """Phrase the problem of a value outside a fixed list."""
    return f"{key} = {value!r}: must be one of {', '.join(legal)}"
