"""What a checkpoint costs: adapters and their optimizer state, against the whole model's."""

import itertools
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import moa
from moa.files.atomic_folder import sync
from moa.files.reading import AdapterInfo
from moa.files.saving import adapter_state_dict, base_hash
from trainer.bench.timing import Comparison
from trainer.checkpoint import checkpoint
from trainer.checkpoint.save_queue import SaveQueue
from trainer.config.model import ModelConfig
from trainer.prepare.backbone import create_backbone

BACKBONE, CLASSES, ROUNDS = "vit_large_patch14_clip_224", 345, 3
MOMENTS = ("exp_avg", "exp_avg_sq")


def measure() -> dict[str, Comparison]:
    """Bytes of either checkpoint, and the seconds for which training waits for it.

    The tensors lie in memory already, on the CPU. All files are synced to the disk of the folder
    for temporary files. Seconds are the best of a few rounds, as others may use the disk, too; the
    whole model is written once.
    """
    created = create_backbone(ModelConfig(backbone=BACKBONE, weights="random"), CLASSES, seed=0)
    model, config = created.model, moa.MoAConfig(method="moa_kron")
    moa.inject(model, config)
    classes = tuple(map(str, range(CLASSES)))
    info = AdapterInfo(BACKBONE, base_hash(model), config, classes, created.data_config)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows: Comparison = {"whole model, Adam": _full(model, root / "full.safetensors")}
        for best, background in itertools.product((False, True), repeat=2):
            name = "adapters, Adam" + ", best adapter" * best + ", background" * background
            rows[name] = _adapters(model, info, root / f"{best}-{background}", best, background)
    full = float(rows["whole model, Adam"]["bytes"])
    for row in rows.values():
        row["% of bytes"] = 100 * float(row["bytes"]) / full
    return {f"checkpoint, {BACKBONE}, moa_kron": rows}


def _full(model: nn.Module, file: Path) -> dict[str, float | str]:
    """The state dict and fp32 moments of all its parameters, as training everything needs."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    moments = _moments({name: p.detach() for name, p in model.named_parameters()})

    def save() -> None:
        save_file(state | moments, file)
        sync(file)

    seconds = _seconds(save)
    size = file.stat().st_size
    file.unlink()
    return {"bytes": size, "blocked s": seconds, "written after s": seconds}


def _adapters(
    model: nn.Module, info: AdapterInfo, root: Path, best: bool, background: bool
) -> dict[str, float | str]:
    """Through the trainer's own code, checksums and deletion of old ones included."""
    masters = {name: t.detach().float().clone() for name, t in adapter_state_dict(model).items()}
    moments, rounds = _moments(masters), []
    extra = masters if best else None
    for step in range(ROUNDS):
        state = {"step": step}
        save = partial(checkpoint.save, root, info, masters, moments, state, keep=1, best=extra)
        with SaveQueue(background) as saves:
            blocked = _seconds(partial(saves.put, save))
            rounds.append((blocked, blocked + _seconds(saves.wait)))
    newest = root / (root / checkpoint.LATEST).read_text(encoding="utf-8").strip()
    return {
        "bytes": sum(path.stat().st_size for path in newest.iterdir()),
        "blocked s": min(blocked for blocked, _ in rounds),
        "written after s": min(written for _, written in rounds),
    }


def _moments(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random fp32 values in the shapes of Adam's moments."""
    return {
        f"{name}|{moment}": torch.randn(tensor.shape)
        for name, tensor in tensors.items()
        for moment in MOMENTS
    }


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
