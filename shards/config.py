"""The data section of a run's configuration."""

from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

from shards.addresses import is_remote, lacks_secrets, without_secrets
from shards.datasets import DATASETS, dataset_spec
from shards.errors import DataConfigError, make_command

Augment = Literal["auto", "domainbed", "no_flip", "crop_flip", "randaugment", "none"]
ResolvedAugment = Literal["domainbed", "no_flip", "crop_flip", "randaugment", "none"]
AugmentOn = Literal["loader", "device"]
Decode = Literal["auto", "pil"]
Truncated = Literal["keep", "substitute"]
Mix = Literal["none", "mixup", "cutmix"]
SamplingMode = Literal["permutation", "window", "replacement"]

MAX_PIXELS = 89_478_485
"""Pixels from which Pillow warns of a decompression bomb: 256 MiB in RGB."""

_CHOICES = {
    "augment": get_args(Augment),
    "augment_on": get_args(AugmentOn),
    "decode": get_args(Decode),
    "truncated": get_args(Truncated),
    "mix": get_args(Mix),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data to train on, how to hold out, order and augment it."""

    dataset: str = "digits"
    """Name of the dataset: `digits` is embedded, `folder` is any shard set of your own."""
    root: str | None = None
    """Folder of the shard set (made by `python -m shards.writer`); unset: the embedded data, built
    on first use."""
    held_out: str | None = None
    """Domain to leave out of training and to test on; unset: the dataset's last domain. `A+B`
    trains on neither and tests on A: the pairs of leave-one-domain-out cross-validation."""
    order: SamplingMode = "permutation"
    """Order within a domain: `permutation` shows every image once per epoch, `window` does so a few
    shards at a time, `replacement` draws independently as DomainBed does."""
    order_window: int = 0
    """Shards per domain that order `window` mixes at a time; 0 in the other orders."""
    cache_dir: str | None = None
    """Folder on the node's own disk for shards of a remote root (`http(s)://`, `s3://`, `gs://`,
    `hf://`, or a command `pipe:... {} ...`), shared by all processes of the node."""
    cache_gib: float = 50.0
    """Largest size of that folder in GiB; the shards wanted longest ago make room for others."""
    fetch_deadline: float = 60.0
    """Seconds that a file of a remote root may take, all attempts together."""
    fetch_retries: int = 3
    """How often storage that fails is asked again, before the run ends."""
    workers: int = 0
    """Loader processes per rank; 0 loads in the training process. Changes speed, never the data."""
    holdout_fraction: float = 0.2
    """Share of every domain kept for validation (DomainBed: 0.2)."""
    augment: Augment = "auto"
    """Training augmentation: `domainbed`, the same without mirroring (`no_flip`) or without colours
    (`crop_flip`), torchvision's RandAugment in place of the colours (`randaugment`), or `none`;
    `auto` is `domainbed`, or `no_flip` where a mirrored image has another class."""
    mix: Mix = "none"
    """What mixes every training image with another one of its domain in the global batch: `mixup`
    (both pictures through each other), `cutmix` (a box of the other), or `none`."""
    mix_alpha: float = 1.0
    """Both parameters of the Beta distribution of the own image's share."""
    augment_on: AugmentOn = "loader"
    """Where colour jitter and normalisation of training images run: with crop and mirroring in the
    `loader`, or on the model's `device`, which leaves the loader about three fifths of the work."""
    decode: Decode = "auto"
    """`auto` decodes JPEG with torchvision and works on tensors; `pil` does all in Pillow as
    DomainBed does, slower; pixels differ by about one grey level on average."""
    truncated: Truncated = "keep"
    """Incomplete image files: `keep` uses what is there, as DomainBed does, `substitute` takes
    another image of the domain; both are counted."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels of an image; larger ones are replaced and counted."""
    exclude_list: str | None = None
    """File of samples to leave out, one key or original path per line: not trained on, evaluated
    apart from the others."""
    include_list: str | None = None
    """The same, but of the only samples to keep."""
    max_bad_fraction: float = 0.001
    """A run ends when more than this share of a domain's images had to be replaced; 10 per epoch
    are tolerated in any case, unless this is 0."""

    def problems(self) -> list[str]:
        """Everything that is out of range, one line per problem, each starting with the key."""
        found = self._dataset_problems() + order_problems(self.order, self.order_window)
        if self.root is not None and lacks_secrets(self.root):
            found.append(
                f"data.root = {self.root!r}: ... stands for what is not written down, since it may "
                "give access; give the whole --data.root again"
            )
        if self.cache_dir is None and is_remote(self.root):
            found.append(cache_dir_missing(self.root))
        tensors_in_pillow = self.augment_on == "device" and self.decode == "pil"
        both_lists = self.exclude_list is not None and self.include_list is not None
        rules = (
            ("held_out", self.held_out == "",
             "names no domain; without it the last one is held out"),
            ("cache_gib", not 0 < self.cache_gib < inf, "must be a finite number > 0"),
            ("fetch_deadline", not 0 < self.fetch_deadline < inf, "must be a finite number > 0"),
            ("fetch_retries", self.fetch_retries < 0, "must be 0 or more"),
            ("workers", self.workers < 0, "must be 0 or more"),
            ("max_pixels", self.max_pixels < 1, "must be 1 or more"),
            ("holdout_fraction", not 0 <= self.holdout_fraction < 1,
             "must lie in [0, 1); DomainBed uses 0.2"),
            *((name, getattr(self, name) not in legal, f"must be one of {', '.join(legal)}")
              for name, legal in _CHOICES.items()),
            ("augment_on", tensors_in_pillow,
             "works on tensors, data.decode = 'pil' in Pillow; leave one of them at its default"),
            ("include_list", both_lists, "not together with data.exclude_list; give one of them"),
            ("mix_alpha", not 0 < self.mix_alpha < inf, "must be a finite number > 0"),
            ("mix_alpha", self.mix == "none" and self.mix_alpha != DataConfig.mix_alpha,
             "has no effect without data.mix mixup or cutmix; add that, or leave it out"),
            ("max_bad_fraction", not 0 <= self.max_bad_fraction <= 1, "must lie in [0, 1]"),
        )  # fmt: skip
        return found + [
            f"data.{name} = {getattr(self, name)!r}: {why}" for name, wrong, why in rules if wrong
        ]

    def _dataset_problems(self) -> list[str]:
        try:
            dataset_spec(self.dataset)
        except DataConfigError as error:
            return [str(error)]
        if self.root is not None or self.dataset == "digits":
            return []
        return [
            f"data.root is not set: dataset {self.dataset!r} is not embedded; give the "
            f"folder of its shard set, made by {make_command(self.dataset)}"
        ]

    def unused(self) -> list[str]:
        """Settings that were given, although only a remote root has a use for them.

        They are legal, since a job script may turn a local root into a remote one.
        """
        if is_remote(self.root):
            return []
        names = ("cache_dir", "cache_gib", "fetch_deadline", "fetch_retries")
        return [name for name in names if getattr(self, name) != getattr(DataConfig, name)]

    def resolved_augment(self) -> ResolvedAugment:
        """The augmentation, with `auto` replaced by what suits the dataset."""
        if self.augment != "auto":
            return self.augment
        spec = DATASETS.get(self.dataset)
        return "domainbed" if spec is None or spec.horizontal_flip else "no_flip"


def order_problems(order: str, window: int) -> list[str]:
    """What is wrong with `data.order` and its window: at most one line."""
    if order not in (legal := get_args(SamplingMode)):
        return [f"data.order = {order!r}: must be one of {', '.join(legal)}"]
    if order == "window" and window < 1:
        return [
            f"data.order_window = {window}: order window needs the number of shards per domain to "
            "mix at a time, 1 or more; 4 is a good start"
        ]
    if order != "window" and window:
        return [
            f"data.order_window = {window}: only for data.order window, not {order}; leave it at 0"
        ]
    return []


def cache_dir_missing(root: str) -> str:
    """The problem of a remote root without a cache."""
    return (
        f"data.cache_dir is not set: data.root = {without_secrets(root)!r} needs a folder on the "
        "node's own disk to keep shards in"
    )
