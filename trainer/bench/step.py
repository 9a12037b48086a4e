"""A whole training step by method: time against stock PEFT LoRA, and peak memory.

The frozen backbone has random weights; images are noise. A step is forward, backward and Adam.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import moa
import trainer.prepare.vit_embedded  # noqa: F401  (registers the embedded backbone)
from trainer.bench.counting import OperationCounter, counted
from trainer.bench.timing import Comparison, Work, in_fresh_process, interleaved, milliseconds
from trainer.monitor.efficiency import highest_resident
from trainer.prepare.footprint import blank_images, fused_attention
from trainer.train.graphed import Graphed

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
    graphed: bool = False
    """Forward, backward and Adam as one CUDA graph."""
    methods: tuple[str, ...] = ()
    """Those of `METHODS` to measure; all if none is named."""

    def in_mode(self, mode: str) -> "Setting":
        """The same in one of `trainer.bench.train.MODES`."""
        return replace(self, compiled="compiled" in mode, graphed="graphed" in mode)

    @property
    def rows(self) -> tuple[str, ...]:
        """The methods that are measured."""
        return self.methods or tuple(METHODS)

    def __str__(self) -> str:
        """Title of the table."""
        parts = ["training step", self.backbone, f"batch {self.batch}", self.device]
        parts.append(str(self.dtype).removeprefix("torch."))
        parts += ["torch.compile"] * self.compiled + ["CUDA graph"] * self.graphed
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
        works = {name: make_step(name, setting) for name in setting.rows}
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
    for name in setting.rows:
        try:
            table[name] = _time_of(name, setting, rounds)
            if on_gpu:
                peaks[name] = torch.cuda.max_memory_allocated()
        except torch.OutOfMemoryError:
            table[name] = {"ms": "out of memory"}
        if on_gpu:
            torch.cuda.empty_cache()
    return table, peaks


def _time_of(name: str, setting: Setting, rounds: int) -> dict[str, float | str]:
    """Milliseconds, and on a GPU what `counted` finds.

    The model goes with this function, be it with an error, before the next's.
    """
    work, device = make_step(name, setting), torch.device(setting.device)
    work()
    if setting.device != "cuda":
        return {"ms": milliseconds(work, rounds, device)}
    torch.cuda.reset_peak_memory_stats()  # a step's peak, not the compiler's
    ms = milliseconds(lambda: [work() for _ in range(IN_FLIGHT)], rounds, device) / IN_FLIGHT
    with counted(device, IN_FLIGHT) as found:
        for _ in range(IN_FLIGHT):
            work()
    return {"ms": ms, **found}


def _peaks_on_cpu(setting: Setting) -> dict[str, int]:
    """Bytes by method; none when compiled, as a compiler's memory would hide that of the step."""
    names = () if setting.compiled else setting.rows
    return {name: in_fresh_process(peak, name, setting) for name in names}


def make_step(
    name: str, setting: Setting, batches: Iterator[tuple[Tensor, Tensor]] | None = None
) -> Work:
    """Builds a model and returns one training step of it, which gives the loss.

    It takes normalised images [b, 3, H, W] and labels below 10 from `batches`; by default it has
    noise on the device.
    """
    torch.manual_seed(0)
    device = torch.device(setting.device)
    with device:  # filling billions of weights on a CPU takes longer than the measurement
        model = _model(name, setting)
    model.to(device, setting.dtype).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    capturable = setting.graphed and device.type == "cuda"
    optimizer = torch.optim.Adam(parameters, capturable=capturable) if parameters else None
    if batches is None:
        noise = torch.randn_like(blank_images(model, setting.batch))
        batches = itertools.repeat((noise, torch.randint(10, (setting.batch,), device=device)))
    if setting.compiled:
        # What was compiled for other methods counts against a limit, beyond which nothing more is.
        torch.compiler.reset()
        moa.compile_blocks(model)

    def compute(images: Tensor, labels: Tensor) -> Tensor:
        scores = model(images.requires_grad_(not parameters))
        loss = F.cross_entropy(scores.float(), labels) + moa.aux_loss(model)
        if optimizer is not None:
            optimizer.zero_grad()
        torch.autograd.backward(loss)
        if optimizer is not None:
            optimizer.step()
        return loss.detach()

    steps = itertools.count()
    graphed = Graphed(model, compute) if setting.graphed else None

    def work() -> Tensor:
        position = moa.RoutingPosition(0, next(steps), 0)
        images, labels = (tensor.to(device, non_blocking=True) for tensor in next(batches))
        inputs = (images.to(setting.dtype), labels)
        if graphed is not None:
            return graphed(inputs, position)
        if METHODS[name] is not None:  # as the trainer does
            moa.set_routing_position(model, position)
        return compute(*inputs)

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
    step, counter = _step_on_meta(name, backbone, dtype), OperationCounter()  # type: ignore[no-untyped-call]
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
