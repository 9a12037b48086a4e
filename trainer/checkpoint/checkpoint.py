"""Checkpoints of what trains: adapters, their optimizer state and the run's position.

A checkpoint folder `step-NNNNNNNN/` holds the adapter's files, `optimizer.safetensors` (Adam's two
moments per trainable name), `best_model.safetensors` (the best adapter so far, unless it is this
one), `averages.safetensors` (if the run keeps averages), `state.json`, and `manifest.json` with
size and SHA-256 of each. The adapter's tensors are the fp32 masters. Nothing in it depends on the
world size or the ZeRO stage, and no frozen tensor is in it. It is complete exactly when it carries
its final name, and `latest` names the newest for people and scripts: the loader itself goes by the
steps and by what verifies.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save as serialize
from torch import Tensor

from moa.errors import AdapterError
from moa.files.atomic_folder import discard, recover_folder, replaced_folder, sync
from moa.files.reading import AdapterInfo, read_adapter
from moa.files.saving import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from shards.errors import StorageError
from trainer.checkpoint.atomic_file import replace_text
from trainer.process.errors import CheckpointError, OutputError, brief

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
OPTIMIZER_FILE, BEST_FILE = "optimizer.safetensors", "best_model.safetensors"
AVERAGES_FILE = "averages.safetensors"
STATE_FILE, MANIFEST_FILE = "state.json", "manifest.json"
NEEDED = {CONFIG_FILE, WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE}
LATEST = "latest"
GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
NAME = re.compile(r"step-\d{8,}")


class UnknownFormatError(CheckpointError):
    """A whole checkpoint of another release; going back over it would lose work in silence."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        folder: where it came from.
        state: contents of `state.json`; `step` counts completed optimizer steps.
        masters: trainable name -> fp32 value.
        moments: `name|exp_avg` and `name|exp_avg_sq` -> fp32 value.
        best: the best adapter's values; None if there is none, or `masters` are the best.
        averages: `part|name` -> fp32 value, from `Averages.tensors`.
    """

    folder: Path
    state: dict[str, Any]
    masters: dict[str, Tensor]
    moments: dict[str, Tensor]
    best: dict[str, Tensor] | None
    averages: dict[str, Tensor] = field(default_factory=dict)


def save(
    root: Path,
    info: AdapterInfo,
    masters: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    best: Mapping[str, Tensor] | None = None,
    averages: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes `root/step-NNNNNNNN`, points `root/latest` at it, drops all but the newest `keep`.

    Only the main rank calls this, with what the engine gathered on all ranks. No older checkpoint
    is touched before the new one is on the disk under its final name.

    Raises `OutputError`: it cannot be written; the older checkpoints are as they were.
    """
    folder = root / f"step-{state['step']:08d}"
    try:
        with replaced_folder(folder) as temporary:
            write_adapter(temporary, masters, info)
            parts = {OPTIMIZER_FILE: moments, BEST_FILE: best, AVERAGES_FILE: averages or None}
            for name, tensors in parts.items():
                if tensors is not None:
                    (temporary / name).write_bytes(serialize(dict(tensors)))
            text = json.dumps({"format_version": FORMAT_VERSION, **state}, indent=2) + "\n"
            (temporary / STATE_FILE).write_text(text, encoding="utf-8")
            for path in temporary.iterdir():
                sync(path)
            manifest = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
            (temporary / MANIFEST_FILE).write_text(_manifest_text(manifest), encoding="utf-8")
        replace_text(root / LATEST, folder.name + "\n")
    except OSError as error:
        older = [path for path in _folders(root) if path != folder]
        kept = f"{older[0].name} is kept" if older else "there is no older one"
        raise OutputError(
            f"checkpoint: cannot write {folder} ({error.strerror or error}); {kept}; free space "
            "there and start again with the same command"
        ) from error
    older = [path for path in _folders(root) if _step(path) <= state["step"]]
    for old in older[keep:]:
        _remove(old)
    return folder


def clean_up(root: Path) -> None:
    """Brings back or removes what a kill during a save left under a passing name."""
    for path in sorted(root.glob("step-*.old")):
        recover_folder(path.with_suffix(""))
    for path in sorted(root.glob("step-*.tmp")):
        log.info("removed %s, left by a save that was cut short", path)
        discard(path)
    for path in root.glob("step-*.rest"):
        shutil.rmtree(path, ignore_errors=True)
    (root / f"{LATEST}.tmp").unlink(missing_ok=True)


def set_aside_newer(root: Path, step: int) -> None:
    """Renames checkpoints beyond `step`, which a start at `step` found damaged, to `*.damaged`."""
    newer = [path for path in _folders(root) if _step(path) > step]
    for folder in newer:
        aside = folder.with_name(folder.name + ".damaged")
        discard(aside)
        folder.rename(aside)
    left = _folders(root)
    if left:
        replace_text(root / LATEST, left[0].name + "\n")
    elif newer:
        (root / LATEST).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Deletes a checkpoint; a kill meanwhile leaves no half of it under its name."""
    trash = folder.with_name(folder.name + ".tmp")
    try:
        folder.rename(trash)
    except OSError as error:
        log.warning("cannot remove the old checkpoint %s: %s", folder, error)
    # What a file system will not delete now, `clean_up` tries again at the next start.
    shutil.rmtree(trash, ignore_errors=True)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _folders(root: Path) -> list[Path]:
    """Checkpoints under their final names, newest (highest step, whatever the clock said) first."""
    with _reading(root):  # glob would take a folder that may not be read for an empty one
        names = os.listdir(root) if root.exists() else []
    return sorted((root / n for n in names if NAME.fullmatch(n)), key=_step, reverse=True)


@contextmanager
def _reading(place: Path) -> Iterator[None]:
    """Tells a damaged checkpoint from a storage that does not give it now.

    Raises:
        CheckpointError: a file is missing or is not what was written; it will not come back.
        StorageError: any other error of reading; the checkpoint may be whole.
    """
    try:
        yield
    except (*GONE, ValueError, AttributeError, AdapterError) as error:
        raise CheckpointError(f"{place}: {error}") from error
    except OSError as error:
        raise StorageError(
            f"{place}: cannot be read now ({error.strerror or error}), which does not make it "
            "damaged; nothing was changed: mend the storage and start again with the same command"
        ) from error


def load_newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, walking back over damaged ones; None if there is none.

    Raises:
        UnknownFormatError: the newest whole one is of another release.
        CheckpointError: there are checkpoints, and none of them is whole.
        StorageError: one cannot be read now; going back over it would lose work in silence.
    """
    folders = _folders(root)
    for folder in folders:
        try:
            return load(folder)
        except UnknownFormatError:
            raise
        except CheckpointError as error:
            log.warning("skipping a damaged checkpoint: %s", error)
    if folders:
        raise CheckpointError(
            f"{root}: none of {len(folders)} checkpoints is whole; restore one from a copy, or "
            "start again in another --output_dir"
        )
    return None


def verify(folder: Path) -> None:
    """Checks size and SHA-256 of every file of a checkpoint; raises as `load` does."""
    with _reading(folder):
        text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
        manifest = json.loads(text)
        if text != _manifest_text(manifest) or not manifest.keys() >= NEEDED:
            raise CheckpointError(f"{folder / MANIFEST_FILE}: not as it was written")
        for name, expected in manifest.items():
            found = _describe(folder / name)
            if found != expected:
                raise CheckpointError(
                    f"{folder / name}: not as it was written ({brief(found)}, then "
                    f"{brief(expected)})"
                )


def load(folder: Path) -> Checkpoint:
    """Reads a checkpoint after verifying it, and once more if the storage fails at first.

    Raises:
        UnknownFormatError: another release wrote it.
        CheckpointError: a file is missing, or differs from the manifest.
        StorageError: it cannot be read now.
    """
    try:
        return _load(folder)
    except StorageError as error:  # NFS forgets a file handle, and finds the file again
        log.warning("%s; trying once more", error.__cause__)
        return _load(folder)


def _load(folder: Path) -> Checkpoint:
    verify(folder)
    with _reading(folder):
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if state.get("format_version") != FORMAT_VERSION:
            raise UnknownFormatError(
                f"{folder}: format_version {state.get('format_version')!r}; this release reads "
                f"{FORMAT_VERSION}: continue with the release that wrote it, or start again in "
                "another --output_dir"
            )
        _, masters = read_adapter(folder)
        moments = load_file(folder / OPTIMIZER_FILE)
        best, averages = (
            load_file(folder / name) if (folder / name).exists() else None
            for name in (BEST_FILE, AVERAGES_FILE)
        )
        return Checkpoint(folder, state, masters, moments, best, averages or {})
