"""Real optimisation steps of large backbones through the DeepSpeed engine.

Each case runs in a process of its own, so that its peak memory is its own: one step on a CPU; on a
GPU several, and every kind of ZeRO.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import moa
from trainer.bench.step import IN_FLIGHT
from trainer.bench.timing import Comparison, in_fresh_process, milliseconds
from trainer.config import deepspeed_json
from trainer.config.model import ModelConfig
from trainer.config.run_config import RunConfig, TrainConfig
from trainer.monitor.efficiency import highest_resident, peak_gib
from trainer.prepare.backbone import Backbone, create_backbone
from trainer.process.device import device_of
from trainer.process.world import ALONE


@dataclass(frozen=True)
class Case:
    """A backbone with random weights, and how it is run."""

    backbone: str
    batch: int
    precision: str
    checkpointing: bool
    method: str = "moa_kron"
    zero: str = "zero2"

    def __str__(self) -> str:
        """Name of the row."""
        parts = [self.backbone, self.method, self.zero, f"batch {self.batch}", self.precision]
        return ", ".join(parts + ["activation checkpointing"] * self.checkpointing)


CASES = (
    Case("vit_large_patch14_clip_224", 2, "fp32", False),
    Case("vit_gigantic_patch14_clip_224", 1, "bf16", True),
)
GPU_CASES = (
    Case("vit_large_patch14_clip_224", 64, "bf16", False),
    *(
        Case("vit_gigantic_patch14_clip_224", 64, "bf16", False, zero=zero)
        for zero in ("zero2", "zero2_offload", "zero3", "zero3_offload")
    ),
    Case("vit_gigantic_patch14_clip_224", 64, "bf16", True),
)


def measure(cases: tuple[Case, ...] = CASES, rounds: int = 0) -> Iterator[dict[str, Comparison]]:
    """Loss, gradient norm, tensors that moved, seconds and peak memory of each case's first step.

    Of `rounds` more steps the median time, and images/s. Yields the table whenever it has grown.
    """
    rows: Comparison = {}
    for case in cases:
        rows[str(case)] = in_fresh_process(_steps, case, rounds)
        yield {"optimisation steps through the engine": rows}


def build(case: Case, device: torch.device) -> tuple[RunConfig, Backbone, dict[str, Any]]:
    """The configuration, the injected backbone, and the DeepSpeed JSON as a run would have it."""
    config = RunConfig(
        model=ModelConfig(
            backbone=case.backbone, weights="random", grad_checkpointing=case.checkpointing
        ),
        moa=moa.MoAConfig(method=case.method),  # type: ignore[arg-type]
        train=TrainConfig(precision=case.precision),  # type: ignore[arg-type]
        ds_config=f"ds_configs/{case.zero}.json",
    )
    with device:  # filling billions of weights on a CPU takes longer than the measurement
        backbone = create_backbone(config.model, num_classes=345, seed=0)
        trainable = moa.inject(backbone.model, config.moa).trainable
    resolved = deepspeed_json.resolve(config, 1, case.batch, case.precision == "bf16", trainable)
    return config, backbone, resolved


def _steps(case: Case, rounds: int) -> dict[str, float | str]:
    """Builds and steps; the engine raises if a trainable tensor got no gradient."""
    from trainer.engine import collectives
    from trainer.engine.engine import Engine

    started = time.perf_counter()
    collectives.start(ALONE)
    config, backbone, resolved = build(case, device_of(ALONE))
    ready = Engine(backbone.model, config.optim, resolved, ALONE, config.moa)
    before = ready.masters()
    moa.set_routing_position(ready.module, moa.RoutingPosition(0, 0, 0))
    images = torch.randn(case.batch, *backbone.data_config["input_size"])
    images = images.to(ready.device, ready.dtype)
    labels = torch.randint(345, (case.batch,), device=ready.device)
    built = time.perf_counter()

    def step() -> torch.Tensor:
        loss = F.cross_entropy(ready.model(images).float(), labels)
        loss = loss + moa.aux_loss(ready.module, collectives.differentiable_sum)
        ready.backward(loss)
        ready.step()
        return loss.detach()

    with ready.checks_gradients():
        loss = float(step())
    row: dict[str, float | str] = {
        "loss": loss,
        "gradient norm": float(ready.grad_norm()),
        "trainable tensors": len(before),
        "moved": sum(not t.equal(before[name]) for name, t in ready.masters().items()),
        "build s": built - started,
        "first step s": time.perf_counter() - built,
    }
    if rounds:
        in_flight = range(IN_FLIGHT)
        ms = milliseconds(lambda: [step() for _ in in_flight], rounds, ready.device) / IN_FLIGHT
        row |= {"ms": ms, "img/s": case.batch / ms * 1000}
    collectives.stop()
    row["peak GiB"] = peak_gib(ready.device)
    if ready.device.type == "cuda":
        row["host GiB"] = highest_resident() / 2**30
    return row
