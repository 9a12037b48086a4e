"""Where a run starts: afresh, after its newest whole checkpoint, or not at all."""

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.checkpoint import checkpoint
from trainer.checkpoint.run_folder import RunFolder, read_rows
from trainer.config.resume_rules import FIXED, LEAKING, free
from trainer.config.run_config import RENAMED, RunConfig, flat
from trainer.evaluate.members import class_difference
from trainer.prepare.parts import Parts
from trainer.process.errors import ConfigError, OutputError, brief

log = logging.getLogger(__name__)

# What the data stream says of itself and a setting decides, where the names differ.
DECIDED_BY: dict[str, tuple[str, ...]] = {
    "sources": ("data.held_out", "data.holdout_fraction"),
    "mode": ("data.order",),
    "window": ("data.order_window",),
    "order": (),  # the version of the order's arithmetic
}


@dataclass(frozen=True)
class Start:
    """The decision, small enough to broadcast.

    Attributes:
        checkpoint: folder to resume from; None starts afresh.
        step: completed optimizer steps.
        changes: settings that `--checkpoint.allow_changes` let differ from the checkpoint's, each
            with `step`, `setting`, `old` and `new`.
    """

    checkpoint: Path | None = None
    step: int = 0
    finished: bool = False
    changes: list[dict[str, Any]] = field(default_factory=list)


def find_start(folder: RunFolder, parts: Parts) -> Start:
    """Decides by what the run folder holds and by `--resume`; for the main rank.

    Raises:
        ConfigError: nothing to resume under `must`, or settings that change the result differ.
        OutputError: the folder holds a run under `never`.
        CheckpointError: checkpoints exist, none is whole.
    """
    checkpoint.clean_up(folder.checkpoints)
    mode, newest = parts.config.resume, checkpoint.load_newest(folder.checkpoints)
    begun = newest is not None or folder.results.exists() or folder.evaluations.exists()
    if mode == "never" and begun:
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
    allowed = {RENAMED.get(name, name) for name in parts.config.checkpoint.allow_changes}
    changes = check_agreement(newest.state, state_of(parts), folder.path, allowed)
    step, steps = int(newest.state["step"]), parts.config.train.steps
    if step > steps:
        raise ConfigError(
            f"train.steps: {steps}, but the run in {folder.path} has done {step} already; give "
            f"{step} or more, or another --output_dir"
        )
    finished = folder.done.exists() and step == steps
    if not finished:
        for change in changes:
            log.warning(
                "%(setting)s: %(old)r -> %(new)r, as --checkpoint.allow_changes says", change
            )
        if changes:
            log.warning(
                "the best adapter is selected anew; what was before is kept in %s",
                folder.before(step),
            )
        rows = read_rows(folder.metrics, torn=True) if folder.metrics.exists() else []
        lost = sum(row["step"] >= step for row in rows)
        again = f"; steps to repeat: {lost}" if lost else ""
        log.info("resumed after step %d from %s%s", step - 1, newest.folder, again)
    return Start(newest.folder, step, finished, [{"step": step, **change} for change in changes])


def state_of(parts: Parts) -> dict[str, Any]:
    """What a checkpoint records so that a later start can be held against it."""
    base = {"base_sha256": parts.info.base_sha256, "classes": list(parts.info.classes)}
    config, data = flat(parts.config), parts.stream.fingerprint() | base
    unbound = free(config)
    binding = {key: value for key, value in config.items() if key not in unbound}
    text = json.dumps([binding, data], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"config": config, "data": data, "config_sha256": digest}


def check_agreement(
    old: Mapping[str, Any], new: Mapping[str, Any], folder: Path, allowed: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Refuses to go on from a state with settings or data that would change the result.

    `old` is the checkpoint's state, `new` is `state_of` the run that would go on from it. Settings
    in `allowed` may differ; `data` stands for the data and the base weights, but never for the
    classes: their numbers are what the run has learnt.

    Returns:
        The differences let through, each with `setting`, `old` and `new`.

    Raises:
        ConfigError: names each other differing setting with its old and new value.
    """
    # What an earlier release had no setting for, it did as the default does now.
    default = flat(RunConfig())
    known = default | {RENAMED.get(k, k): v for k, v in old["config"].items()}
    settings = _differences(known, new["config"])
    wanted = default | new["config"]
    unbound = free(wanted)
    changes = [change for change in settings if change["setting"] not in unbound]
    if wanted["average.beta"]:  # its weights so far were for another end
        allowed = set(allowed) - {"train.steps"}
    refused = [change for change in changes if change["setting"] not in allowed]
    classes, now = (state["data"].get("classes", []) for state in (old, new))
    if classes != now:
        lines = [_refusal(change, folder) for change in refused]
        raise ConfigError("\n".join([*lines, _other_classes(classes, now, folder)]))
    if not refused:  # otherwise the data differ because a setting does
        data = _differences(old["data"], new["data"])
        if "data" not in allowed:
            data = [c for c in data if not _follows(c["setting"], changes)]
            refused = [{**c, "setting": f"data or base weights ({c['setting']})"} for c in data]
        else:
            changes += [{**c, "setting": f"data ({c['setting']})"} for c in data]
    if refused:
        raise ConfigError("\n".join(_refusal(change, folder) for change in refused))
    return changes


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"setting": key, "old": old.get(key), "new": value}
        for key, value in new.items()
        if old.get(key) != value
    ]


def _follows(entry: str, changes: list[dict[str, Any]]) -> bool:
    """Whether an entry of the data's description differs because of a setting let through."""
    names = {change["setting"] for change in changes}
    if entry in DECIDED_BY:
        return bool(names & set(DECIDED_BY[entry]))
    return entry in {name.rpartition(".")[2] for name in names}


def _other_classes(old: Sequence[str], new: Sequence[str], folder: Path) -> str:
    return (
        f"classes: the run in {folder} {class_difference(old, new)} the data now, so that its "
        "labels would mean other things; give the data with its classes in their order, or start "
        "another run with another --output_dir"
    )


def _refusal(change: Mapping[str, Any], folder: Path) -> str:
    name = change["setting"]
    key = "data" if name.startswith("data or") else name
    old, new = brief(change["old"]), brief(change["new"])
    start = f"{name}: the run in {folder} has {old}, now {new}; "
    if key in LEAKING or key in FIXED:
        why = FIXED.get(key, "what this one has trained on would be tested on")
        return f"{start}keep the old value, or start another run with another --output_dir: {why}"
    return (
        f"{start}keep the old value, start another run with another --output_dir, or go on "
        f"regardless with --checkpoint.allow_changes='[{key}]'"
    )
