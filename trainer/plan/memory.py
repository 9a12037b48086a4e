"""Arithmetic of a run before it exists: batches, and bytes in memory under DeepSpeed ZeRO.

Letters: n trainable numbers, W processes, b bytes of the working precision, a bytes of the gradient
accumulation. What is said of buffers follows DeepSpeed 0.19; alignment (a few numbers) is left out.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from trainer.config.averages import AverageConfig
from trainer.plan.sizes import Weights
from trainer.prepare.footprint import Footprint

GIB = 2**30
TIGHT = 0.9
"""Share of a GPU's memory beyond which fragmentation may make a run fail that fits on paper."""
CONTEXT_BYTES = GIB
"""Allowance for the CUDA context (about half of it), cuBLAS and NCCL."""

_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# DeepSpeed's defaults where the JSON is silent.
_REDUCE_BUCKET, _MAX_LIVE = 500_000_000, 1_000_000_000

Place = Literal["gpu", "host"]


@dataclass(frozen=True)
class Term:
    """A part of the memory of one process, and how it comes about."""

    name: str
    bytes: int
    place: Place
    formula: str


@dataclass(frozen=True)
class Sharding:
    """The entries of a resolved DeepSpeed JSON that decide about memory."""

    stage: int
    world_size: int
    bf16: bool
    accumulation_bytes: int
    buckets: int
    bucket_numbers: int
    max_live: int
    optimizer_offloaded: bool
    weights_offloaded: bool

    @property
    def precision(self) -> str:
        """The working precision."""
        return "bf16" if self.bf16 else "fp32"

    @property
    def working_bytes(self) -> int:
        """Bytes of one number in the working precision."""
        return _ELEMENT_BYTES[self.precision]

    @property
    def bucket_bytes(self) -> int:
        """Bytes of all gradient buckets."""
        each = self.working_bytes if self.stage > 1 else self.accumulation_bytes
        return self.buckets * self.bucket_numbers * each


def read_sharding(content: dict[str, Any], world_size: int) -> Sharding:
    """What a resolved DeepSpeed JSON says, with DeepSpeed's defaults."""
    zero, bf16 = content["zero_optimization"], bool(content["bf16"]["enabled"])
    stage = int(zero["stage"])
    named = content.get("data_types", {}).get("grad_accum_dtype")
    accumulation = _ELEMENT_BYTES.get(named, 2 if bf16 else 4)
    optimizer_offloaded, weights_offloaded = (
        zero.get(name, {}).get("device", "none") != "none"
        for name in ("offload_optimizer", "offload_param")
    )
    # Stage 1 in bf16 with fp32 accumulation is DeepSpeed's bf16 optimizer: it accumulates in place.
    in_place = stage == 1 and bf16 and accumulation == 4 and not optimizer_offloaded
    # Without offload the engine switches `overlap_comm` off: one bucket holds all.
    overlaps = stage < 3 and optimizer_offloaded and zero.get("overlap_comm", False)
    buckets = 2 if overlaps else 1
    if in_place or not zero.get("contiguous_gradients", True):
        buckets = 0
    return Sharding(
        stage=stage,
        world_size=world_size,
        bf16=bf16,
        accumulation_bytes=accumulation,
        buckets=buckets,
        bucket_numbers=int(zero.get("reduce_bucket_size", _REDUCE_BUCKET)),
        max_live=int(zero.get("stage3_max_live_parameters", _MAX_LIVE)),
        optimizer_offloaded=optimizer_offloaded,
        weights_offloaded=weights_offloaded,
    )


def memory_terms(
    weights: Weights, sharding: Sharding, footprint: Footprint, graphed: bool = False
) -> tuple[Term, ...]:
    """All terms. Their sum is an upper bound: not every term is at its largest at the same time.

    Evaluation replaces the activations of training while it runs; only the larger counts. With
    `graphed` both count: a CUDA graph keeps its memory.
    """
    return (
        *_weight_terms(weights, sharding),
        *_optimizer_terms(weights, sharding),
        *_activation_terms(footprint, graphed),
        Term("CUDA context, cuBLAS, NCCL", CONTEXT_BYTES, "gpu", "allowance"),
    )


def _activation_terms(footprint: Footprint, graphed: bool) -> Iterator[Term]:
    training, n = footprint.peak, footprint.images
    kept, more = min(footprint.kept, training), footprint.evaluation - training
    yield Term("activations kept for backward", kept, "gpu", f"measured, {n} images")
    yield Term("workspace of forward and backward", training - kept, "gpu", "peak beyond the kept")
    if graphed:
        yield Term("evaluation", footprint.evaluation, "gpu", "beside what the CUDA graph keeps")
    elif more > 0:
        yield Term("evaluation beyond training", more, "gpu", "a larger batch, no graph")


def _weight_terms(weights: Weights, sharding: Sharding) -> Iterator[Term]:
    b, split = sharding.working_bytes, sharding.stage == 3
    place: Place = "host" if split and sharding.weights_offloaded else "gpu"
    parts, over = (sharding.world_size, " / W") if split else (1, "")
    frozen, n = weights.frozen, weights.trainable
    frozen_bytes = math.ceil(frozen / parts) * b + weights.buffer_bytes
    yield Term("frozen weights", frozen_bytes, place, f"{frozen:,}{over} x {b} B")
    yield Term("trainable weights", math.ceil(n / parts) * b, place, f"n{over} x {b} B")
    if parts > 1 or place == "host":
        live = min(frozen + n, sharding.max_live)
        yield Term("gathered weights", live * b, "gpu", "stage3_max_live_parameters at most")


def _optimizer_terms(weights: Weights, sharding: Sharding) -> Iterator[Term]:
    n, part = weights.trainable, math.ceil(weights.trainable / sharding.world_size)
    place: Place = "host" if sharding.optimizer_offloaded else "gpu"
    a, b = sharding.accumulation_bytes, sharding.working_bytes
    yield Term("fp32 masters", part * 4, place, "n / W x 4 B")
    yield Term("Adam moments", part * 8, place, "n / W x 2 x 4 B")
    if sharding.stage == 1:
        # Every rank accumulates the whole gradient; beside it, backward's own in low precision.
        own = b if a != b else 0
        formula = f"n x {a} B" + (f" + n x {own} B" if own else "")
        yield Term("gradients", n * (a + own), "gpu", formula)
    else:
        yield Term("gradients", part * a, place, f"n / W x {a} B")
        if not sharding.buckets:
            yield Term("gradients before reduction", n * b, "gpu", f"n x {b} B")
    if sharding.buckets:
        formula = f"{sharding.buckets} x reduce_bucket_size {sharding.bucket_numbers:,}"
        yield Term("gradient buckets", sharding.bucket_bytes, "gpu", formula)


def kept_terms(weights: Weights, sharding: Sharding, averages: AverageConfig) -> Iterator[Term]:
    """What a run holds beside the model: weights it reads, its best adapter so far, averages."""
    share = 4 * math.ceil(weights.trainable / sharding.world_size)
    # Averages live on the masters, and where those are.
    place: Place = "host" if sharding.optimizer_offloaded else "gpu"
    whole = weights.frozen + weights.trainable
    yield Term(
        "weights while they are read", 4 * whole + weights.buffer_bytes, "host",
        f"{whole:,} x 4 B, in the main process",
    )  # fmt: skip
    yield Term("best adapter", 4 * weights.trainable, "host", "n x 4 B, in the main process")
    for name, title in (("ema", "EMA"), ("beta", "Beta average"), ("uniform", "uniform average")):
        if name in averages.names:
            yield Term(title, share, place, "n / W x 4 B")
    if averages.swad:
        copies = averages.swad_copies
        yield Term("SWAD", copies * share, place, f"n / W x 4 B, {copies} times at most")


def gpu_bytes(terms: tuple[Term, ...]) -> int:
    """Sum of the terms on the GPU."""
    return sum(term.bytes for term in terms if term.place == "gpu")


def memory_warnings(
    used: int, gpu_memory: float | None, trainable: int, sharding: Sharding
) -> Iterator[str]:
    """What deserves a second look, if a run takes `used` bytes of a GPU with `gpu_memory` GiB."""
    if gpu_memory is not None and used > TIGHT * gpu_memory * GIB:
        how = "does not fit" if used > gpu_memory * GIB else "hardly fits, fragmentation counted,"
        yield (
            f"the run {how} in {gpu_memory:g} GiB: use --model.grad_checkpointing true, a larger "
            "--train.accumulation, or more processes"
        )
    # A bucket is allocated in full, however few numbers ever lie in it.
    if sharding.bucket_bytes > GIB // 4 and sharding.bucket_numbers > 8 * trainable:
        yield (
            f"the gradient buckets take {sharding.bucket_bytes / GIB:.2f} GiB for {trainable:,} "
            "trainable numbers: lower zero_optimization.reduce_bucket_size in the DeepSpeed JSON "
            "to a little more than those"
        )
