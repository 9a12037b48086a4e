"""One process of the parity matrix: trains the same four steps under many arrangements.

Started by tests/trainer/engine/test_parity.py. Writes what
the main rank saw to the file given.
"""

import json
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

sys.path[0] = str(Path(__file__).resolve().parents[2])

import deepspeed  # noqa: E402  (needs the repaired path, as in run.py)
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import moa  # noqa: E402
from moa import MoAConfig  # noqa: E402
from shards import finish_images  # noqa: E402
from shards.stream.batches import Batch  # noqa: E402
from tests.support.dispatched import Dispatched  # noqa: E402
from trainer.checkpoint.run_folder import RunFolder  # noqa: E402
from trainer.config.optim import OptimConfig  # noqa: E402
from trainer.config.run_config import ROOT, ModelConfig, RunConfig, TrainConfig  # noqa: E402
from trainer.engine import collectives  # noqa: E402
from trainer.engine.engine import Engine  # noqa: E402
from trainer.prepare.parts import Parts, build  # noqa: E402
from trainer.process.world import World, world_from_environment  # noqa: E402
from trainer.train.loop import Trainer  # noqa: E402

STEPS = 4
DEADLINE = 1000.0
BUFFER = "not_rounded"
# An eps near the gradients' size: with a small one Adam divides every error of scale away.
OPTIM = OptimConfig(name="adamw", lr=2e-3, eps=1e-2, weight_decay=0.1, clip=0.05)


def run_config(
    method: str,
    accumulation: int = 1,
    checkpointing: bool = False,
    compile: Literal["off", "blocks"] = "off",
    precision: Literal["fp32", "bf16"] = "fp32",
    head: Literal["linear", "cosine"] = "linear",
    **adapters: Any,
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(grad_checkpointing=checkpointing, compile=compile, head=head),
        moa=MoAConfig(method=method, **adapters),  # type: ignore[arg-type]
        optim=OPTIM,
        train=TrainConfig(
            steps=STEPS,
            batch_per_domain=4,
            accumulation=accumulation,
            seed=7,
            precision=precision,
            skip_nonfinite=2,
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


_batches: dict[int, list[Batch]] = {}


def batches_of(parts: Parts, world: World, accumulation: int) -> list[Batch]:
    """This rank's share of all steps: the same under every arrangement, so it is read once."""
    if accumulation not in _batches:
        loader = parts.stream.loader(
            0, STEPS, world.rank, world.size, workers=0, accumulation=accumulation
        )
        _batches[accumulation] = list(loader)
    return _batches[accumulation]


def reference(config: RunConfig) -> dict[str, Any]:
    """Plain torch, one process: AdamW, clip_grad_norm_, nothing of the engine.

    In bf16 the weights are rounded after every step from fp32 masters, which Adam steps by fp32
    sums of the gradients; in fp32 the masters are the weights.
    """
    parts = stirred(build(config, World(0, 1, 0, 1)))
    model, pieces = parts.model.train(), config.train.accumulation
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    model.to(dtype)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    masters = {n: p.detach().float().clone() for n, p in trained.items()}
    optim = config.optim
    adam = torch.optim.AdamW(
        masters.values(), lr=optim.lr, eps=optim.eps, weight_decay=optim.weight_decay
    )
    batches = iter(batches_of(parts, World(0, 1, 0, 1), pieces))
    rows = []
    for step in range(STEPS):
        losses = []
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for _ in range(pieces):
            batch = next(batches)
            moa.set_routing_position(
                model, moa.RoutingPosition(config.train.seed, step, batch.first_slot)
            )
            images = finish_images(batch, torch.device("cpu"), parts.info.data_config).to(dtype)
            loss = F.cross_entropy(model(images).float(), batch.labels) + moa.aux_loss(model)
            (loss / pieces).backward()
            losses.append(loss.item())
            for name, p in trained.items():
                if p.grad is not None:
                    masters[name].grad += p.grad.float()
                p.grad = None
        moa.update_balance(model)
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), optim.clip).item()
        adam.step()
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(masters[name])
        rows.append({"loss": sum(losses) / pieces, "grad_norm": norm})
    final = {n: t.detach().clone() for n, t in moa.adapter_state_dict(model).items()}
    return {"rows": rows, "final": final | masters}


class Reductions:
    """Notes what is reduced over the ranks meanwhile: (name of the collective, dtype, numbers)."""

    NAMES = ("all_reduce", "reduce", "reduce_scatter_tensor")

    def __enter__(self) -> list[tuple[str, str, int]]:
        seen: list[tuple[str, str, int]] = []
        self.held = [(dist, name, getattr(dist, name)) for name in self.NAMES]
        backend = deepspeed.comm.comm.cdb  # keeps one of them as it was at its start
        self.held.append((backend, "reduce_scatter_function", backend.reduce_scatter_function))

        def noting(name: str, real: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                tensor = kwargs.get("tensor", kwargs.get("input", args[-1] if args else None))
                seen.append((name, str(tensor.dtype).removeprefix("torch."), tensor.numel()))
                return real(*args, **kwargs)

            return call

        for owner, name, real in self.held:
            setattr(owner, name, noting(name, real))
        return seen

    def __exit__(self, *_: object) -> None:
        for owner, name, real in self.held:
            setattr(owner, name, real)


def shortest_timeout() -> float:
    """Seconds, of every group that there is, DeepSpeed's too."""
    groups = [group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._pg_map]
    return min(group.options._timeout.total_seconds() for group in groups)


def under_engine(config: RunConfig) -> dict[str, Any]:
    """The product's own engine and training step."""
    world = world_from_environment()
    parts = stirred(build(config, world))
    held = sum(p.numel() for p in parts.model.parameters() if not p.is_meta)
    parts.model.register_buffer(BUFFER, torch.tensor([1.001]))  # as EVA's rotary tables
    ready = Engine(parts.model, config.optim, parts.ds_json, world, config.moa, parts.tokens(world))
    trainer = Trainer(parts, world, ready, None, None, {})  # type: ignore[arg-type]
    batches = iter(batches_of(parts, world, config.train.accumulation))
    ready.module.train()
    rows = []
    for step in range(STEPS):
        warm = step > 1 and config.model.compile == "blocks"
        once = torch.compiler.set_stance("fail_on_recompile") if warm else nullcontext()
        seen = Dispatched()
        watched = step == STEPS - 1 and config.model.compile == "off"  # it would be compiled anew
        last = seen.watching() if watched else nullcontext()
        with Reductions() as reductions, once, last:
            trainer.train_step(batches)
        trainer.step = step + 1
        trainer.behind.read()
        (row,) = trainer.rows.known
        rows.append({key: row[key] for key in ("loss", "grad_norm")})
        trainer.rows.write()
    return {
        "held_elsewhere": collectives.sum_numbers([held * (not world.is_main)], ready.device)[0],
        "reductions": reductions,
        "reads": dict(seen.reads),
        "deadlines": shortest_timeout() / DEADLINE,
        "buffer": float(ready.module.get_buffer(BUFFER)),
        "rows": rows,
        "final": ready.masters(),
        "moments": ready.moments(),
        "resident": sum(p.numel() for p in ready.module.parameters()),
        "restored": restores(ready),
    }


def restores(ready: Engine) -> bool:
    """Whether other masters and moments, given back as a resume does, are what is held then."""
    moments = ready.moments()
    stepped = {n: t for n, t in ready.masters().items() if f"{n}|exp_avg" in moments}
    wanted = {name: tensor + 1 for name, tensor in (stepped | moments).items()}
    ready.write(wanted, wanted, STEPS)
    found = ready.masters() | ready.moments()
    return all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


class Faulty:
    """Makes the last rank's loss NaN in step 1, and its gradient infinite in step 2."""

    def __init__(self, trainer: Trainer, parameter: torch.Tensor) -> None:
        self.trainer, self.is_last = trainer, trainer.world.rank == trainer.world.size - 1
        self.loss = F.cross_entropy
        parameter.register_hook(self.gradient)  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        loss = self.loss(*args, **options)
        return loss * math.nan if self.is_last and self.trainer.step == 1 else loss

    def gradient(self, given: torch.Tensor) -> torch.Tensor:
        return given + math.inf if self.is_last and self.trainer.step == 2 else given


def under_faults(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Whether masters and moments stayed as they were in each of four steps, and what was said."""
    world = world_from_environment()
    parts = build(config, world)
    ready = Engine(parts.model, config.optim, parts.ds_json, world, config.moa, parts.tokens(world))
    trainer = Trainer(parts, world, ready, None, RunFolder(folder), {})  # type: ignore[arg-type]
    batches = iter(batches_of(parts, world, 1))
    head = ready.trainables["head.weight"]
    fault, loss = Faulty(trainer, head), F.cross_entropy
    F.cross_entropy = fault  # type: ignore[assignment]
    ready.module.train()
    states, skipped = [], []
    for step in range(4):
        trainer.train_step(batches)
        trainer.step = step + 1
        trainer.behind.read()
        states.append(ready.masters() | ready.moments())
        skipped.append(collectives.sum_numbers([trainer.nonfinite.skipped], ready.device)[0])
    F.cross_entropy = loss
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(states)]
    finite = all(bool(tensor.isfinite().all()) for tensor in states[-1].values())
    return {"same": same, "skipped": skipped, "finite": finite}


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
    moa.compile_blocks = partial(moa.compile_blocks, backend="eager")
    if world.size > 1 or not all(case.get("reference") for case in cases):
        collectives.start(world, DEADLINE)
    for case in cases:
        config = run_config(**case["config"])
        if case.get("reference"):
            results[case["name"]] = reference(config)
            continue
        config = replace(config, ds_config=with_changes(case, target.parent, world.rank))
        if case.get("faults"):
            results[case["name"]] = under_faults(config, target.parent)
            continue
        results[case["name"]] = under_engine(config)
    if world.is_main:
        torch.save(results, target)
    collectives.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(os.environ["PARITY_CASES"]))
