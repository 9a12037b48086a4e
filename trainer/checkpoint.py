"""Checkpoints of what trains: adapters, their optimizer state and the run's position.

A checkpoint folder `step-NNNNNNNN/` holds the adapter's files, `optimizer.safetensors` (Adam's two
moments per trainable name), `state.json`, and `manifest.json` with size and SHA-256 of each. The
adapter's tensors are the fp32 masters. Nothing in it depends on the world size or the ZeRO stage,
and no frozen tensor is in it. It is complete exactly when it carries its final name.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from moa.errors import AdapterError
from moa.state import AdapterInfo, read_adapter, replaced_folder, write_adapter
from trainer.errors import CheckpointError

log = logging.getLogger(__name__)

OPTIMIZER_FILE, STATE_FILE, MANIFEST_FILE = "optimizer.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        folder: where it came from.
        state: contents of `state.json`; `step` counts completed optimizer steps.
        masters: trainable name -> fp32 value.
        moments: `name|exp_avg` and `name|exp_avg_sq` -> fp32 value.
    """

    folder: Path
    state: dict[str, Any]
    masters: dict[str, Tensor]
    moments: dict[str, Tensor]


def save(
    root: Path,
    info: AdapterInfo,
    masters: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes `root/step-NNNNNNNN`, points `root/latest` at it, drops all but the newest `keep`.

    Only the main rank calls this, with what the engine gathered on all ranks.
    """
    folder = root / f"step-{state['step']:08d}"
    with replaced_folder(folder) as temporary:
        write_adapter(temporary, masters, info)
        (temporary / OPTIMIZER_FILE).write_bytes(serialize(dict(moments)))
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        manifest = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
    pointer = root / "latest.tmp"
    pointer.write_text(folder.name + "\n")
    os.replace(pointer, root / "latest")
    older = [path for path in _folders(root) if path.name <= folder.name]
    for old in older[keep:]:
        shutil.rmtree(old)
    return folder


def set_aside_newer(root: Path, step: int) -> None:
    """Renames checkpoints beyond `step`, which a start at `step` found damaged, to `*.damaged`."""
    for folder in _folders(root):
        if folder.name > f"step-{step:08d}":
            aside = folder.with_name(folder.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _folders(root: Path) -> list[Path]:
    """Complete checkpoints, newest (highest step) first."""
    return sorted(root.glob("step-" + "[0-9]" * 8), reverse=True)


def load_newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, walking back over damaged ones; None if there is none.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    folders = _folders(root)
    for folder in folders:
        try:
            return load(folder)
        except CheckpointError as error:
            log.warning("skipping a damaged checkpoint: %s", error)
    if folders:
        raise CheckpointError(
            f"{root}: none of {len(folders)} checkpoints is whole; restore one from a copy, or "
            "start again in another --output_dir"
        )
    return None


def load(folder: Path) -> Checkpoint:
    """Reads a checkpoint after checking size and SHA-256 of every file.

    Raises:
        CheckpointError: a file is missing, or differs from the manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            found = _describe(folder / name)
            if found != expected:
                raise CheckpointError(f"{folder / name}: expected {expected}, found {found}")
        _, masters = read_adapter(folder)
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return Checkpoint(folder, state, masters, load_file(folder / OPTIMIZER_FILE))
    except (OSError, ValueError, AttributeError, AdapterError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
