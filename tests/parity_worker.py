"""One process of the parity matrix: trains the same six steps under many arrangements.

Started by tests/test_trainer_parity.py under `torchrun`, or plainly for the reference. Writes what
the main rank saw to the file given.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import moa
from moa import MoAConfig
from shards import finish_images
from trainer import engine
from trainer.build import Parts, build
from trainer.config import ROOT, ModelConfig, OptimConfig, RunConfig, TrainConfig
from trainer.engine import Engine
from trainer.loop import Trainer
from trainer.world import world_from_environment

STEPS = 6
# An eps near the gradients' size: with a small one Adam divides every error of scale away.
OPTIM = OptimConfig(name="adamw", lr=2e-3, eps=1e-2, weight_decay=0.1, clip=0.05)


def run_config(
    method: str, accumulation: int = 1, checkpointing: bool = False, **adapters: Any
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(grad_checkpointing=checkpointing),
        moa=MoAConfig(method=method, **adapters),  # type: ignore[arg-type]
        optim=OPTIM,
        train=TrainConfig(
            steps=STEPS, batch_per_domain=4, accumulation=accumulation, seed=7, precision="fp32"
        ),
    )


def stirred(parts: Parts) -> Parts:
    """With adapters of size one: as they start, most of their gradients would be zero."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in moa.adapter_state_dict(parts.model).items():
        fresh = torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and not name.startswith("head.") and not tensor.is_meta:
            tensor.copy_(tensor + 0.1 * fresh)
    return parts


def reference(config: RunConfig) -> dict[str, Any]:
    """Plain torch, one process: AdamW, clip_grad_norm_, nothing of the engine."""
    from trainer.world import World

    parts = stirred(build(config, World(0, 1, 0, 1)))
    model, pieces = parts.model.train(), config.train.accumulation
    trained = [p for p in model.parameters() if p.requires_grad]
    optim = config.optim
    adam = torch.optim.AdamW(trained, lr=optim.lr, eps=optim.eps, weight_decay=optim.weight_decay)
    batches = iter(parts.stream.loader(0, STEPS, 0, 1, workers=0, accumulation=pieces))
    rows = []
    for step in range(STEPS):
        losses = []
        for _ in range(pieces):
            batch = next(batches)
            moa.set_routing_position(
                model, moa.RoutingPosition(config.train.seed, step, batch.first_slot)
            )
            images = finish_images(batch, torch.device("cpu"), parts.info.data_config)
            loss = F.cross_entropy(model(images), batch.labels) + moa.aux_loss(model)
            (loss / pieces).backward()
            losses.append(loss.item())
        moa.update_balance(model)
        norm = torch.nn.utils.clip_grad_norm_(trained, optim.clip).item()
        adam.step()
        adam.zero_grad()
        rows.append({"loss": sum(losses) / pieces, "grad_norm": norm})
    final = {n: t.detach().clone() for n, t in moa.adapter_state_dict(model).items()}
    return {"rows": rows, "final": final}


def under_engine(config: RunConfig) -> dict[str, Any]:
    """The product's own engine and training step."""
    world = world_from_environment()
    parts = stirred(build(config, world))
    ready = Engine(parts.model, config.optim, parts.ds_json, world, config.moa, parts.tokens(world))
    trainer = Trainer(parts, world, ready, None, None, {})  # type: ignore[arg-type]
    batches = iter(
        parts.stream.loader(
            0, STEPS, world.rank, world.size, workers=0, accumulation=config.train.accumulation
        )
    )
    ready.module.train()
    rows = []
    for step in range(STEPS):
        row, _ = trainer.train_step(batches)
        trainer.step = step + 1
        rows.append({key: row[key] for key in ("loss", "grad_norm")})
    return {
        "rows": rows,
        "final": ready.masters(),
        "moments": ready.moments(),
        "resident": sum(p.numel() for p in ready.module.parameters()),
    }


def with_changes(case: dict[str, Any], folder: Path, rank: int) -> str:
    """The case's DeepSpeed file, or a copy with other ZeRO entries."""
    if not case.get("zero"):
        return str(case["ds_config"])
    content = json.loads((ROOT / case["ds_config"]).read_text())
    content["zero_optimization"] |= case["zero"]
    changed = folder / f"rank{rank}.json"
    changed.write_text(json.dumps(content))
    return str(changed)


def main(target: Path, cases: list[dict[str, Any]]) -> None:
    world = world_from_environment()
    results = {}
    if world.size > 1 or not all(case.get("reference") for case in cases):
        engine.start(world)
    for case in cases:
        config = run_config(**case["config"])
        if case.get("reference"):
            results[case["name"]] = reference(config)
            continue
        config = replace(config, ds_config=with_changes(case, target.parent, world.rank))
        results[case["name"]] = under_engine(config)
    if world.is_main:
        torch.save(results, target)
    engine.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(os.environ["PARITY_CASES"]))
