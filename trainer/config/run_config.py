"""`RunConfig`: every setting of a run, in sections; checked as a whole before any work.

Imports neither torch nor deepspeed, so that `--help` answers at once.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from moa.config import MoAConfig
from shards.addresses import without_secrets
from shards.config import DataConfig
from trainer.config.averages import AverageConfig
from trainer.config.class_texts import read_class_names, read_templates
from trainer.config.limits import COUNT, NUMBER, SECONDS, SEED, out_of_range
from trainer.config.objective import ObjectiveConfig
from trainer.config.optim import OptimConfig
from trainer.config.resume_rules import FIXED
from trainer.process.errors import ConfigError, did_you_mean, noted
from trainer.process.stopping import seconds_of

RENAMED = {"data.mode": "data.order", "data.window": "data.order_window"}
"""Settings by the names they had when older runs and recipes were written."""
ROOT = Path(__file__).resolve().parent.parent.parent
"""Folder that holds `trainer/`, `ds_configs/` and the other top-level folders."""


MOST_PIXELS = 2**14
"""Of a side of an image."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen backbone."""

    backbone: str = "vit_embedded.glyphs"
    """timm name, architecture.tag; vit_embedded is the small one shipped with the trainer"""
    weights: str = "pretrained"
    """pretrained (timm's own for the tag), random, or the path of a safetensors file"""
    image_size: int | None = None
    """side of the images in pixels, a multiple of the patch; position embeddings are interpolated
    (default: the backbone's own size)"""
    patch_size: int | None = None
    """side of the patches in pixels; their embedding is resampled (default: the backbone's own)"""
    dynamic_size: bool = False
    """leave the base's position embeddings as they are, and interpolate them at every forward"""
    grad_checkpointing: bool = False
    """recompute activations in backward: less memory, about a third more time"""
    compile: Literal["off", "blocks"] = "off"
    """blocks: torch.compile of the transformer's blocks in training, at the first step; the result
    is the same up to rounding"""
    head: Literal["linear", "cosine"] = "linear"
    """linear, or cosine: scores are scaled cosines with a vector for each class; from text these
    stay and CLIP's projection trains, at random they train themselves"""
    head_init: Literal["random", "text"] = "random"
    """random, or text: the classifier starts as CLIP's zero-shot classifier of the class names,
    exactly if it is a cosine, else up to the confidence"""
    head_frozen: bool = False
    """keep a cosine head from text as it starts, CLIP's projection too"""
    text_model: str | None = None
    """open_clip model of the texts: NAME:TAG, NAME:FILE, hf-hub:OWNER/REPOSITORY or
    local-dir:FOLDER; default: the model whose visual tower the backbone is"""
    prompts: str = "photo"
    """texts of head_init text: photo (one sentence), styles (the mean over twelve), a file with one
    template a line, or a template such as 'a photo of a {}.'"""
    class_names: str | None = None
    """YAML file of `class: words` for classes that the texts shall call otherwise"""

    def problems(self) -> list[str]:
        """Every setting that cannot work, one line each."""
        found = [
            f"model.{name}: {size}; must be a whole number from 1 to {MOST_PIXELS}"
            for name, size in (("image_size", self.image_size), ("patch_size", self.patch_size))
            if size is not None and not 1 <= size <= MOST_PIXELS
        ]
        if self.head_frozen and (self.head, self.head_init) != ("cosine", "text"):
            found.append(
                "model.head_frozen: true keeps a head as it starts, which only one from text is "
                "good for; add --model.head cosine --model.head_init text, or leave it out"
            )
        if self.head_init == "text":
            if self.weights == "random":
                needed = "a pretrained CLIP backbone, not model.weights random"
                return [*found, f"model.head_init: text fits {needed}"]
            with noted(found):
                read_templates(self.prompts)
            with noted(found):
                read_class_names(self.class_names)
            return found
        return found + [
            f"model.{name}: {getattr(self, name)!r} has no effect without --model.head_init text"
            for name in ("text_model", "prompts", "class_names")
            if getattr(self, name) != getattr(ModelConfig, name)
        ]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and on what batches; sizes are those of the global batch, over all processes."""

    steps: int = 5001
    """optimizer steps; as in DomainBed, k * eval_every + 1 ends on an evaluation"""
    batch_per_domain: int = 32
    """images of each source domain in the global batch"""
    eval_every: int = 300
    """evaluate after steps 0, eval_every, 2 eval_every ... and after the last"""
    eval_batch: int = 128
    """images per process in an evaluation batch"""
    accumulation: int = 1
    """micro-batches that each process accumulates per step; bounds memory. The balance loss is
    taken per micro-batch, everything else stays the same"""
    seed: int = 0
    """seed of initialisation, order, augmentation and gate noise"""
    trial_seed: int = 0
    """seed of the 80/20 split of every domain, DomainBed's trial seed"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto is bf16 on a GPU and fp32 on a CPU; fills the auto entries of the DeepSpeed JSON"""
    time_limit: str | None = None
    """save and exit 75 before this much time has passed since the start, such as 3h30m, 45m or
    SLURM's 1-12:00:00; it leaves room for the longest step, evaluation and save so far"""
    skip_nonfinite: int = 0
    """steps with a loss or gradient that is not finite to leave out before giving up"""
    step_deadline: float = 1800.0
    """seconds in which no process gets on after which all end (three times that for the first
    step of a start); 0 waits for ever"""

    def problems(self) -> list[str]:
        """Every range problem, one line each."""
        found = out_of_range(
            "train", self, steps=COUNT, batch_per_domain=COUNT, eval_every=COUNT, eval_batch=COUNT,
            accumulation=COUNT, seed=SEED, trial_seed=SEED, skip_nonfinite=SEED,
            step_deadline=SECONDS,
        )  # fmt: skip
        try:
            seconds_of(self.time_limit or "1s")
        except ValueError:
            found.append(
                f"train.time_limit: {self.time_limit!r}; must be a duration such as 3h30m, 45m, "
                "600s or 1-12:00:00 (days-hours:minutes:seconds; in YAML within quotes)"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is evaluated while training."""

    mode: Literal["full", "selection"] = "full"
    """full evaluates every domain each time; selection only the source domains' out splits, which
    choose the adapter, and everything once at the end, for the selected and for the last adapter"""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints of adapters and their optimizer state."""

    every: int = 100
    """steps between checkpoints; the last step always writes one"""
    keep: int = 2
    """newest checkpoints kept; each also carries the best adapter so far"""
    background: bool = False
    """write them in a thread, so that training waits for the copies to the CPU only"""
    allow_changes: tuple[str, ...] = ()
    """settings, such as [optim.lr], that a resumed run may change although they change its result;
    data stands for the data or the base weights themselves. Each change is kept on record"""

    def problems(self) -> list[str]:
        """Every range problem, one line each."""
        found = out_of_range("checkpoint", self, every=NUMBER, keep=NUMBER)
        legal = [*flat(RunConfig()), "data"]
        for name in (RENAMED.get(name, name) for name in self.allow_changes):
            if name in FIXED:
                found.append(
                    f"checkpoint.allow_changes: {name!r} cannot change within a run, since "
                    f"{FIXED[name]}; keep the old value, or start again in another --output_dir"
                )
            elif name not in legal:
                hint = did_you_mean(name, legal)
                found.append(f"checkpoint.allow_changes: {name!r} is no setting{hint}")
        return found


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A complete run."""

    ds_config: str = "ds_configs/zero2.json"
    """DeepSpeed JSON; its "auto" entries are filled from this configuration"""
    output_dir: str | None = None
    """run folder; default outputs/DATASET-BACKBONE-HELD_OUT-METHOD-seedS-trialT"""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto continues the run in output_dir if there is one, never refuses to, must insists"""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moa: MoAConfig = field(default_factory=MoAConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def check(self) -> None:
        """Raises `ConfigError` with every problem of every section, one a line."""
        found: list[str] = []
        for section in vars(self).values():
            found += section.problems() if hasattr(section, "problems") else []
        found += self._problems_of_head()
        if self.output_dir == "":
            found.append("output_dir: '' names no folder; without it the default is used")
        if not self.ds_config_path().is_file():
            shipped = sorted(f"ds_configs/{path.name}" for path in ROOT.glob("ds_configs/*.json"))
            found.append(f"ds_config: no file {self.ds_config!r}; shipped are {', '.join(shipped)}")
        if found:
            raise ConfigError("\n".join(found))

    def _problems_of_head(self) -> list[str]:
        """What other sections ask of the head and it cannot give, one line each."""
        model, margin, found = self.model, self.objective.margin, []
        if margin and (model.head, model.head_init) != ("cosine", "text"):
            found.append(
                f"objective.margin: {margin} needs embeddings of the classes; add --model.head "
                "cosine --model.head_init text, or leave it at 0"
            )
        if model.head_frozen and self.moa.method == "linear":
            found.append(
                "model.head_frozen: true leaves nothing to train with moa.method linear; give "
                "another method, or leave it out"
            )
        return found

    def ds_config_path(self) -> Path:
        """The DeepSpeed JSON: as given, else relative to the folder that holds `trainer/`."""
        given = Path(self.ds_config)
        return given if given.is_file() else ROOT / given

    def run_folder(self, held_out: str) -> Path:
        """The run folder, with the default name filled in."""
        if self.output_dir:
            return Path(self.output_dir)
        train = self.train
        backbone = self.model.backbone.rpartition("/")[2].partition(".")[0]
        name = f"{self.data.dataset}-{backbone}-{held_out}-{self.moa.method}"
        return Path("outputs") / f"{name}-seed{train.seed}-trial{train.trial_seed}"


def dotted(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names, as of today, and values of nested settings, as a YAML file has them."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield RENAMED.get(f"{prefix}{key}", f"{prefix}{key}"), value


def as_plain(config: RunConfig) -> dict[str, Any]:
    """Nested dictionary of plain types (tuples become lists), as written to `config.yaml`.

    What may give access is left out; it is only in `config` itself.
    """
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    if config.data.root is not None:
        plain["data"]["root"] = without_secrets(config.data.root)
    return plain


def flat(config: RunConfig) -> dict[str, Any]:
    """Dotted names, such as `moa.ranks`, and plain values, as JSON and YAML give them back."""
    return dict(dotted(as_plain(config)))
