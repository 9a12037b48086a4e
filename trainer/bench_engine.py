"""One real optimisation step of large backbones through the DeepSpeed engine.

Each runs in a process of its own, so that its peak memory is its own.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import moa
from trainer import ds_json
from trainer.bench_timing import Table
from trainer.config import ModelConfig, RunConfig, TrainConfig
from trainer.model import Backbone, create_backbone
from trainer.peak_memory import highest_resident
from trainer.world import ALONE

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A backbone with random weights, and how it is run."""

    backbone: str
    batch: int
    precision: str
    checkpointing: bool
    method: str = "moa_kron"

    def __str__(self) -> str:
        """Name of the row."""
        kept = ", activation checkpointing" if self.checkpointing else ""
        return f"{self.backbone}, {self.method}, batch {self.batch}, {self.precision}{kept}"


CASES = (
    Case("vit_large_patch14_clip_224", 2, "fp32", False),
    Case("vit_gigantic_patch14_clip_224", 1, "bf16", True),
)


def measure(cases: tuple[Case, ...] = CASES) -> dict[str, Table]:
    """Loss, gradient norm, tensors that moved, seconds and peak memory of one step each."""
    rows: Table = {}
    for case in cases:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            rows[str(case)] = pool.submit(_one_step, case).result()
    return {"one optimisation step through the engine": rows}


def build(case: Case) -> tuple[RunConfig, Backbone, dict[str, Any]]:
    """The configuration, the injected backbone, and the DeepSpeed JSON as a run would have it."""
    config = RunConfig(
        model=ModelConfig(
            backbone=case.backbone, weights="random", grad_checkpointing=case.checkpointing
        ),
        moa=moa.MoAConfig(method=case.method),  # type: ignore[arg-type]
        train=TrainConfig(precision=case.precision),  # type: ignore[arg-type]
    )
    backbone = create_backbone(config.model, num_classes=345, seed=0)
    trainable = moa.inject(backbone.model, config.moa).trainable
    resolved = ds_json.resolve(config, 1, case.batch, case.precision == "bf16", trainable)
    ds_json.check_buckets(resolved, trainable)
    return config, backbone, resolved


def _one_step(case: Case) -> dict[str, float | str]:
    """Builds and steps once; the engine raises if a trainable tensor got no gradient."""
    from trainer import engine

    started = time.perf_counter()
    engine.start(ALONE)
    config, backbone, resolved = build(case)
    ready = engine.Engine(backbone.model, config.optim, resolved, ALONE, config.moa)
    before = ready.masters()
    moa.set_routing_position(ready.module, moa.RoutingPosition(0, 0, 0))
    images = torch.randn(case.batch, *backbone.data_config["input_size"])
    labels = torch.randint(345, (case.batch,), device=ready.device)
    built = time.perf_counter()
    with ready.checks_gradients():
        scores = ready(images.to(ready.device, ready.dtype))
        loss = F.cross_entropy(scores.float(), labels)
        loss = loss + moa.aux_loss(ready.module, engine.differentiable_sum)
        ready.backward(loss)
        ready.step()
    stepped = time.perf_counter()
    after = ready.masters()
    moved = sum(not torch.equal(after[name], before[name]) for name in before)
    engine.stop()
    return {
        "loss": float(loss.detach()),
        "gradient norm": ready.grad_norm(),
        "trainable tensors": len(before),
        "moved": moved,
        "build s": built - started,
        "step s": stepped - built,
        "peak GiB": _peak_bytes() / GIB,
    }


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return highest_resident()
