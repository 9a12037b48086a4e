"""A whole training step by method: time against stock PEFT LoRA, and peak memory.

The frozen backbone has random weights; images are noise. A step is forward, backward and Adam.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import moa
import trainer.prepare.vit_embedded  # noqa: F401  (registers the embedded backbone)
from trainer.bench.timing import Comparison, Work, in_fresh_process, interleaved, milliseconds
from trainer.monitor.efficiency import highest_resident
from trainer.prepare.footprint import blank_images, fused_attention

REFERENCE = "PEFT LoRA r=8, qkv of all blocks"
METHODS = {
    REFERENCE: None,
    "backbone alone, gradient of the input": None,
    "lora r=8, qkv of all blocks": moa.MoAConfig(
        method="lora", ranks=(8,), targets=("attn.qkv",), blocks="all"
    ),
    "moa_lora": moa.MoAConfig(method="moa_lora"),
    "moa_kron": moa.MoAConfig(method="moa_kron"),
}
IN_FLIGHT = 5
"""Steps that follow each other on a GPU before anyone waits for them, as in training."""


@dataclass(frozen=True)
class Setting:
    """What every variant of a table has in common."""

    backbone: str
    batch: int
    device: str
    dtype: torch.dtype
    compiled: bool = False
    checkpointing: bool = False
    alone: bool = False

    def __str__(self) -> str:
        """Title of the table."""
        parts = ["training step", self.backbone, f"batch {self.batch}", self.device]
        parts.append(str(self.dtype).removeprefix("torch."))
        parts += ["torch.compile"] * self.compiled
        return ", ".join(parts + ["activation checkpointing"] * self.checkpointing)


def measure(setting: Setting, rounds: int) -> Comparison:
    """Time, images/s, MFU, operations, peak memory and their ratios to PEFT LoRA for each method.

    On a CPU the methods take turns; on a GPU, where several large models do not fit beside each
    other, each runs alone. MFU is `step_flops` against a matrix product measured in the same call.
    """
    device = torch.device(setting.device)
    yardstick = matmul_flops(device, setting.dtype)
    if setting.alone:
        table, peaks = _alone(setting, rounds)
    else:
        works = {name: make_step(name, setting) for name in METHODS}
        table, peaks = interleaved(works, rounds, device), _peaks_on_cpu(setting)
    reference = table[REFERENCE]["ms"]
    for name, row in table.items():
        if isinstance(row["ms"], str):
            continue
        seconds = row["ms"] / 1000
        row["img/s"] = setting.batch / seconds
        row["MFU"] = step_flops(name, setting.backbone) * setting.batch / seconds / yardstick
        row["operations"] = step_operations(name, setting.backbone, setting.dtype)
        if setting.alone and not isinstance(reference, str):
            row["ratio"] = row["ms"] / reference
        if name in peaks:
            row["peak GiB"] = peaks[name] / 2**30
            if REFERENCE in peaks:
                row["peak ratio"] = peaks[name] / peaks[REFERENCE]
    return table


def _alone(setting: Setting, rounds: int) -> tuple[Comparison, dict[str, int]]:
    """Milliseconds and peak bytes of each method, or that it does not fit."""
    table: Comparison = {}
    on_gpu = setting.device == "cuda"
    peaks = {} if on_gpu else _peaks_on_cpu(setting)
    for name in METHODS:
        try:
            table[name] = {"ms": _time_of(name, setting, rounds)}
            if on_gpu:
                peaks[name] = torch.cuda.max_memory_allocated()
        except torch.OutOfMemoryError:
            table[name] = {"ms": "out of memory"}
        if on_gpu:
            torch.cuda.empty_cache()
    return table, peaks


def _time_of(name: str, setting: Setting, rounds: int) -> float:
    """Milliseconds; the model goes with this function, be it with an error, before the next's."""
    work, in_a_row = make_step(name, setting), 1
    work()
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # a step's peak, not the compiler's
        in_a_row = IN_FLIGHT
    device = torch.device(setting.device)
    return milliseconds(lambda: [work() for _ in range(in_a_row)], rounds, device) / in_a_row


def _peaks_on_cpu(setting: Setting) -> dict[str, int]:
    """Bytes by method; none when compiled, as a compiler's memory would hide that of the step."""
    names = () if setting.compiled else METHODS
    return {name: in_fresh_process(peak, name, setting) for name in names}


def make_step(name: str, setting: Setting) -> Work:
    """Builds a model and returns one training step of it."""
    torch.manual_seed(0)
    device = torch.device(setting.device)
    with device:  # filling billions of weights on a CPU takes longer than the measurement
        model = _model(name, setting)
    model.to(device, setting.dtype).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters) if parameters else None
    images = torch.randn_like(blank_images(model, setting.batch)).requires_grad_(not parameters)
    labels = torch.randint(10, (setting.batch,), device=device)
    if setting.compiled:
        # What was compiled for other methods counts against a limit, beyond which nothing more is.
        torch.compiler.reset()
        moa.compile_blocks(model)

    steps = itertools.count()

    def work() -> None:
        if METHODS[name] is not None:  # as the trainer does
            moa.set_routing_position(model, moa.RoutingPosition(0, next(steps), 0))
        loss = F.cross_entropy(model(images).float(), labels) + moa.aux_loss(model)
        if optimizer is not None:
            optimizer.zero_grad()
        torch.autograd.backward(loss)
        if optimizer is not None:
            optimizer.step()

    return work


def _model(name: str, setting: Setting) -> nn.Module:
    model: nn.Module = timm.create_model(setting.backbone, pretrained=False, num_classes=10)
    if setting.checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    config = METHODS[name]
    if config is not None:
        moa.inject(model, config)
    elif name == REFERENCE:
        import peft  # of the test extra

        targets = peft.LoraConfig(r=8, target_modules=r".*attn\.qkv", modules_to_save=["head"])
        return peft.get_peft_model(model, targets)
    else:
        model.requires_grad_(False)
    return model


def peak(name: str, setting: Setting) -> int:
    """Bytes that this process needs for two steps beyond what importing takes, PEFT included."""
    import peft  # noqa: F401  (else it would count as memory of the one method that uses it)

    imported = highest_resident()
    work = make_step(name, setting)
    work()
    work()
    return max(1, highest_resident() - imported)  # a tiny model hides below the imports' peak


_COMPUTES_NOTHING = ("empty", "new_empty", "_unsafe_view", "promote_types")


class _OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that compute something."""

    operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        free = func.is_view or func.overloadpacket.__name__.startswith(_COMPUTES_NOTHING)
        self.operations += not free
        return func(*args, **(kwargs or {}))


@cache
def step_flops(name: str, backbone: str) -> int:
    """Floating point operations of one image's forward and backward, without recomputation."""
    step = _step_on_meta(name, backbone, torch.float32)
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


@cache
def step_operations(name: str, backbone: str, dtype: torch.dtype) -> int:
    """Operations that an eager forward and backward dispatch, attention being one.

    Not counted are views, allocations, the optimizer and what activation checkpointing repeats. On
    the meta device, so that any machine counts alike; a GPU multiplies bf16 by a few more.
    """
    step, counter = _step_on_meta(name, backbone, dtype), _OperationCounter()  # type: ignore[no-untyped-call]
    with fused_attention(), counter:
        step()
    return counter.operations


def _step_on_meta(name: str, backbone: str, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of one image."""
    with torch.device("meta"):
        model = _model(name, Setting(backbone, 1, "meta", dtype)).to(dtype).train()
    images = blank_images(model, 1).requires_grad_()

    def step() -> None:
        moa.set_routing_position(model, moa.RoutingPosition(0, 0, 0))
        loss = model(images).sum() + moa.aux_loss(model)
        torch.autograd.backward(loss)

    return step


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the yardstick of MFU."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = min(milliseconds(lambda: a @ a, 3, device) for _ in range(8))
    return 2 * side**3 / (best / 1000)
