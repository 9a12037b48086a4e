"""Where a run starts: afresh, after its newest whole checkpoint, or not at all."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import checkpoint
from trainer.build import Parts
from trainer.config import RunConfig, flat_fields
from trainer.errors import ConfigError, OutputError
from trainer.run_folder import RunFolder

log = logging.getLogger(__name__)

# Settings that change where or how fast a run computes, never its result. More steps are free as
# well, since nothing in a step depends on how many follow.
FREE = {
    "ds_config", "output_dir", "resume", "data.root", "data.workers", "model.weights",
    "model.grad_checkpointing",
    "train.steps", "train.eval_batch", "checkpoint.every", "checkpoint.keep",
}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """The decision, small enough to broadcast.

    Attributes:
        checkpoint: folder to resume from; None starts afresh.
        step: completed optimizer steps.
        finished: whether nothing is left to do.
    """

    checkpoint: Path | None = None
    step: int = 0
    finished: bool = False


def find_start(folder: RunFolder, parts: Parts) -> Start:
    """Decides by what the run folder holds and by `--resume`; for the main rank.

    Raises:
        ConfigError: nothing to resume under `must`, or settings that change the result differ.
        OutputError: the folder holds a run under `never`.
        CheckpointError: checkpoints exist, none is whole.
    """
    mode, newest = parts.config.resume, checkpoint.load_newest(folder.checkpoints)
    if mode == "never" and (newest is not None or folder.results.exists()):
        raise OutputError(
            f"output_dir: {folder.path} already holds a run; give another --output_dir, or "
            "--resume auto to continue it"
        )
    if newest is None and folder.done.exists():
        raise OutputError(
            f"output_dir: {folder.path} holds a finished run without its checkpoints; going on "
            "would delete its results: give another --output_dir, or remove that folder"
        )
    if newest is None:
        if mode == "must":
            raise ConfigError(
                f"resume: must, but {folder.checkpoints} holds no checkpoint; check --output_dir, "
                "or use --resume auto"
            )
        return Start()
    check_agreement(newest.state, state_of(parts), folder.path)
    step, steps = int(newest.state["step"]), parts.config.train.steps
    if step > steps:
        raise ConfigError(
            f"train.steps: {steps}, but the run in {folder.path} has done {step} already; give "
            f"{step} or more, or another --output_dir"
        )
    finished = folder.done.exists() and step == steps
    if not finished:
        log.info("resumed after step %d from %s", step - 1, newest.folder)
    return Start(newest.folder, step, finished)


def state_of(parts: Parts) -> dict[str, Any]:
    """What a checkpoint records so that a later start can be held against it."""
    base = {"base_sha256": parts.info.base_sha256, "classes": list(parts.info.classes)}
    return {"config": flat(parts.config), "data": parts.stream.fingerprint() | base}


def flat(config: RunConfig) -> dict[str, Any]:
    """Dotted setting names and plain values, as JSON gives them back."""
    settings = flat_fields(config)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in settings.items()}


def check_agreement(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """Refuses to go on with settings or data that would change the result.

    Raises:
        ConfigError: names each differing setting with its old and new value.
    """
    differing = [
        f"{key}: the run in {folder} has {old['config'].get(key)!r}, now {value!r}"
        for key, value in new["config"].items()
        if key not in FREE and old["config"].get(key) != value
    ]
    if not differing:
        differing = [
            f"data or base weights ({key}): the run in {folder} has {old['data'].get(key)!r}, "
            f"now {value!r}"
            for key, value in new["data"].items()
            if old["data"].get(key) != value
        ]
    if differing:
        remedy = "; keep the old value, or start another run with another --output_dir"
        raise ConfigError("\n".join(line + remedy for line in differing))
