"""One process of the parity matrix: trains the same four steps under many arrangements.

Started by tests/trainer/engine/test_parity.py. Writes what
the main rank saw to the file given.
"""

import gc
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
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from scipy.stats import beta  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import moa  # noqa: E402
from moa import MoAConfig  # noqa: E402
from shards import DataConfig, finish_images  # noqa: E402
from shards.stream.batches import Batch  # noqa: E402
from tests.support.dispatched import Dispatched  # noqa: E402
from tests.support.slow_objectives import slow_objective  # noqa: E402
from trainer.checkpoint.run_folder import RunFolder  # noqa: E402
from trainer.config.averages import AverageConfig  # noqa: E402
from trainer.config.model import ModelConfig  # noqa: E402
from trainer.config.objective import ObjectiveConfig  # noqa: E402
from trainer.config.optim import OptimConfig  # noqa: E402
from trainer.config.run_config import ROOT, RunConfig, TrainConfig  # noqa: E402
from trainer.engine import collectives  # noqa: E402
from trainer.engine.engine import Engine  # noqa: E402
from trainer.objectives.mixup import draw_ring  # noqa: E402
from trainer.prepare import vit_embedded  # noqa: E402
from trainer.prepare.parts import Parts, build  # noqa: E402
from trainer.process.world import World, world_from_environment  # noqa: E402
from trainer.train.loop import Trainer  # noqa: E402

vit_embedded._SIZES["depth"] = 3  # of which two have adapters, as many as more would tell
STEPS = 4
DEADLINE = 1000.0
BUFFER = "not_rounded"
# An eps near the gradients' size: with a small one Adam divides every error of scale away.
OPTIM = OptimConfig(
    name="adamw", lr=2e-3, eps=1e-2, weight_decay=0.1, clip=0.05,
    schedule="cosine", warmup=1, head_lr=0.5, betas=(0.8, 0.99),
)  # fmt: skip
# After a warm-up of one step, half a cosine over the rest.
RATES = (0.5, 1.0, 0.5, 0.0)
SPARED = (
    "logits",
    "bias",
    "temperature",
    "norm.weight",
    "norm1.weight",
    "norm2.weight",
    "cls_token",
    "pos_embed",
)
AVERAGE = AverageConfig(beta=0.5, uniform=2)
SEEN = {"aux_weight": 1.0}
"""With the default's hundredth, a quarter of the balance's gradient passes for all of it.

Not with accumulation: a piece of two ranks are other images than one of a single process, which is
another balance, as it is no sum over images.
"""


def run_config(
    method: str,
    accumulation: int = 1,
    checkpointing: bool = False,
    compile: Literal["off", "blocks"] = "off",
    precision: Literal["fp32", "bf16"] = "fp32",
    graph: Literal["off", "on"] = "off",
    head: Literal["linear", "cosine"] = "linear",
    dropout: float = 0.0,
    objective: dict[str, Any] | None = None,
    held_out: str | None = None,
    batch_per_domain: int = 4,
    **adapters: Any,
) -> RunConfig:
    shown: dict[str, Any] = SEEN if accumulation == 1 else {}
    return RunConfig(
        data=DataConfig(held_out=held_out),
        objective=ObjectiveConfig(**objective or {}),
        model=ModelConfig(
            grad_checkpointing=checkpointing, compile=compile, head=head, dropout=dropout
        ),
        moa=MoAConfig(method=method, **(shown | adapters)),  # type: ignore[arg-type]
        optim=OPTIM,
        average=AVERAGE,
        train=TrainConfig(
            steps=STEPS,
            batch_per_domain=batch_per_domain,
            accumulation=accumulation,
            seed=7,
            precision=precision,
            graph=graph,
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


_batches: dict[tuple[int, int], list[Batch]] = {}


def batches_of(parts: Parts, world: World, accumulation: int) -> list[Batch]:
    """This rank's share of all steps: the same under every arrangement, so it is read once."""
    key = accumulation, parts.stream.global_batch
    if key not in _batches:
        loader = parts.stream.loader(
            0, STEPS, world.rank, world.size, workers=0, accumulation=accumulation
        )
        _batches[key] = list(loader)
    return _batches[key]


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
    spared = [n for n in masters if n.startswith("kron_rule.") or n.endswith(SPARED)]
    groups = [
        {"params": [masters[n]], "weight_decay": 0.0 if n in spared else optim.weight_decay}
        | {"factor": optim.head_lr if n.startswith("head.") else 1.0}
        for n in masters
    ]
    adam = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    path = [{n: t.double() for n, t in masters.items()}]
    batches = iter(batches_of(parts, World(0, 1, 0, 1), pieces))
    rows = []
    slow = Slow(parts, trained, dtype) if config.objective != ObjectiveConfig() else None
    for step in range(STEPS):
        losses = []
        if step == getattr(config.objective, f"{config.objective.name}_anneal", None):
            adam.state.clear()
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for _ in range(pieces):
            batch = next(batches)
            moa.set_routing_position(
                model, moa.RoutingPosition(config.train.seed, step, batch.first_slot)
            )
            images = finish_images(batch, torch.device("cpu"), parts.info.data_config).to(dtype)
            if slow is None:
                loss = F.cross_entropy(model(images).float(), batch.labels) + moa.aux_loss(model)
                (loss / pieces).backward()
            else:
                loss = slow(images, batch, step)
            losses.append(loss.item())
            for name, p in trained.items():
                if p.grad is not None:
                    masters[name].grad += p.grad.float()
                p.grad = None
        moa.update_balance(model)
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), optim.clip).item()
        for group in adam.param_groups:
            group["lr"] = group["factor"] * optim.lr * RATES[step]
        adam.step()
        path.append({n: t.double() for n, t in masters.items()})
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(masters[name])
        rows.append({"loss": sum(losses) / pieces, "grad_norm": norm})
    final = {n: t.detach().clone() for n, t in moa.adapter_state_dict(model).items()}
    return {"rows": rows, "final": final | masters, "averages": averages_of(path)}


def averages_of(path: list[dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """Closed sums over the weights before the first step and after each."""
    places = (np.arange(STEPS + 1) + 0.5) / (STEPS + 1)
    shares = {"beta": beta.pdf(places, AVERAGE.beta, AVERAGE.beta), "uniform": [0, 0, 0, 1, 1]}
    return {
        kind: {
            n: sum(w * point[n] for w, point in zip(s, path, strict=True)) / sum(s) for n in path[0]
        }
        for kind, s in shares.items()
    }


class Slow:
    """Gradients of a whole batch in one piece under any objective, with SAM's two passes."""

    def __init__(self, parts: Parts, trained: dict[str, torch.nn.Parameter], dtype: Any) -> None:
        self.parts, self.trained, self.dtype = parts, list(trained.values()), dtype
        self.config, self.sources = parts.config.objective, len(parts.stream.sources)
        self.q = torch.ones(self.sources, dtype=torch.float64)

    def __call__(self, images: torch.Tensor, batch: Batch, step: int) -> torch.Tensor:
        loss, q = self.backward(images, batch, step)
        if self.config.sam:
            with torch.no_grad():
                kept = [p.clone() for p in self.trained]
                gradients = [p.grad for p in self.trained]
                norm = torch.cat([g.flatten().double() for g in gradients]).norm()  # type: ignore[union-attr]
                for p, gradient in zip(self.trained, gradients, strict=True):
                    p += (self.config.sam / norm * gradient).to(p.dtype)
                    p.grad = None
            self.backward(images, batch, step)
            with torch.no_grad():
                for p, own in zip(self.trained, kept, strict=True):
                    p.copy_(own)
        self.q = q
        return loss

    def backward(
        self, images: torch.Tensor, batch: Batch, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        model: Any = self.parts.model
        if self.config.name == "mixup":
            loss = self.mixed(images, batch, step)
            q = self.q
        else:
            features = model.forward_head(model.forward_features(images), pre_logits=True)
            scores = model.head(features)
            if self.parts.config.model.dropout:
                features = model.head.dropout(features)
            loss, _, q = slow_objective(
                self.config, scores.double(), features.double(), batch.labels, batch.domains,
                step, self.q,
            )  # fmt: skip
        (loss + moa.aux_loss(model)).backward()
        return loss.detach(), q

    def mixed(self, images: torch.Tensor, batch: Batch, step: int) -> torch.Tensor:
        config, sources = self.parts.config, self.parts.stream.sources
        ring = draw_ring(config.train.seed, step, self.sources, self.config.mixup_alpha)
        where = [batch.domains == source for source in sources]
        x, labels = torch.empty_like(images), torch.empty_like(batch.labels)
        shares = torch.empty(len(images))
        for here, partner, share in zip(where, ring.partners, ring.shares, strict=True):
            x[here] = (share * images[here] + (1 - share) * images[where[partner]]).to(self.dtype)
            labels[here], shares[here] = batch.labels[where[partner]], share
        scores = self.parts.model(x).float()
        own = F.cross_entropy(scores, batch.labels, reduction="none")
        return (
            shares * own + (1 - shares) * F.cross_entropy(scores, labels, reduction="none")
        ).mean()


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
        "averages": trainer.validation.averages.whole(),
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
        gc.collect()
        gc.freeze()  # what earlier cases left, DeepSpeed would look through for every engine
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
