"""How a plan is shown: titled rows, as tables or as one JSON object."""

import json
from dataclasses import asdict

from trainer.plan.data import Request
from trainer.plan.memory import GIB
from trainer.plan.planning import SHARING, Plan
from trainer.plan.scaling import Prediction
from trainer.plan.whole_table import POOLS, TablePlan
from trainer.prepare.batches import Batches
from trainer.process.tables import Table, output_console

Rows = list[tuple[str, str, str]]
"""What, how much, and how it comes about."""

_IN_CHECKPOINT = "with Adam's moments, the best adapter and averages; about"


def sections(plan: Plan, gpu_memory: float | None = None) -> dict[str, Rows]:
    """The plan as titled rows of text."""
    fits = "" if gpu_memory is None else f"{gpu_memory:g} GiB: "
    if gpu_memory is not None:
        fits += "fits" if plan.gpu_bytes <= gpu_memory * GIB else "does not fit"
    evaluated = f"{plan.images_evaluated:,}" if plan.images_evaluated else "sizes not known"
    return {
        "run": [(name.replace("_", " "), str(value), "") for name, value in plan.run.items()],
        "trainable numbers": _count_rows(plan),
        "files": [
            ("adapter file", f"{plan.adapter_bytes:,} B", "fp32"),
            ("one checkpoint, at most", f"{plan.checkpoint_bytes:,} B", _IN_CHECKPOINT),
        ],
        "memory per process": [
            *((t.name, _gib(t.bytes), t.formula) for t in plan.memory if t.place == "gpu"),
            ("sum on the GPU, at most", _gib(plan.gpu_bytes), fits),
            *((f"host: {t.name}", _gib(t.bytes), t.formula) for t in plan.memory
              if t.place == "host"),
        ],
        "compute (multiply-add = 2 FLOPs)": _compute_rows(plan),
        "batches": [*_batch_rows(plan.batches), ("images evaluated", evaluated, "")],
        f"expert parallelism, sent per process and step if {SHARING} share the experts": (
            _traffic_rows(plan)
        ),
        f"predicted step, the batch of {plan.batches.global_batch} images shared out "
        f"({_rates(plan)})": [_step_row(p, plan.batches.steps) for p in plan.predictions],
    }  # fmt: skip


def _rates(plan: Plan) -> str:
    rates, precision = plan.rates, plan.run["precision"]
    how = "measured" if plan.measured else "assumed"
    graph = "forward and backward as one CUDA graph, " if plan.load.graphed else ""
    return (
        f"{how}: {rates.flops / 1e12:.3g} TFLOP/s a GPU in {precision}, {graph}"
        f"{1e6 * rates.operation:.0f} us an operation; others in docs/distributed.md"
    )


def _step_row(step: Prediction, steps: int) -> tuple[str, str, str]:
    pace = f"{step.efficiency:.1%} computing"
    if step.bound != "device":
        pace = f"{step.bound}-bound: the GPU needs {1000 * step.device:,.1f} ms"
    speed = f"{step.world * step.images / step.seconds:,.0f} images/s"
    whole = f"all steps {steps * step.seconds / 3600:,.2f} h"
    return f"{step.world} GPUs", f"{1000 * step.seconds:,.1f} ms", f"{speed}, {whole}, {pace}"


def _count_rows(plan: Plan) -> Rows:
    without = plan.trainable - plan.roles.get("head", 0)
    rows = [(role, f"{count:,}", "") for role, count in plan.roles.items()]
    share = f"{100 * plan.trainable / plan.total:.3f} % of {plan.total:,}"
    return [*rows, ("without head", f"{without:,}", ""), ("all", f"{plan.trainable:,}", share)]


def _compute_rows(plan: Plan) -> Rows:
    foot, batches = plan.footprint, plan.batches
    parts = {"forward": foot.forward, "backward": foot.backward, "recomputed": foot.recomputed}
    rows = [(f"{name} per image", f"{n / 1e9:,.2f} GFLOP", "") for name, n in parts.items() if n]
    step = sum(parts.values()) * batches.global_batch
    whole = f"{step * batches.steps / 1e18:,.3f} EFLOP in all steps"
    return [*rows, ("step, global batch", f"{step / 1e12:,.2f} TFLOP", whole)]


def _traffic_rows(plan: Plan) -> Rows:
    return [
        (name, f"{count / 2**20:,.2f} MiB", "this run's" if name == plan.load.transport else "")
        for name, count in plan.traffic.items()
        if count
    ]


def _batch_rows(batches: Batches) -> Rows:
    rows = []
    for name, value in asdict(batches).items():
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        elif isinstance(value, dict):
            value = ", ".join(f"{k} {v:.2f}" for k, v in value.items()) or "sizes not known"
        else:
            value = f"{value:,}"
        rows.append((name.replace("_", " "), value, ""))
    return rows


def _gib(count: int) -> str:
    return f"{count / GIB:,.3f} GiB"


def show_table(plan: TablePlan, request: Request) -> None:
    """Prints what a whole table costs: JSON, or a table whose marked entries are the fastest."""
    console = output_console()
    if request.json:
        console.out(json.dumps(asdict(plan) | {"runs": plan.runs}))
        return
    rows, fastest = [], {n: plan.fastest(n, request.gpu_memory) for n in POOLS}
    for choice in plan.choices:
        hours = (choice.wall_hours.get(n) for n in POOLS)
        pace = f"{choice.bound}-bound" if choice.bound != "device" else ""
        rows.append([
            f"{choice.gpus}", _gib(choice.gpu_bytes), f"{1000 * choice.step_seconds:,.1f} ms", pace,
            f"{choice.run_seconds / 3600:,.2f}", f"{choice.gpu_hours:,.1f}",
            *("" if h is None else f"{h:,.2f}" for h in hours),
        ])  # fmt: skip
    columns = ["GPUs a run", "a GPU", "step", "", "hours a run", "GPU hours",
               *(f"on {n}" for n in POOLS)]  # fmt: skip
    bold = [(row, 6 + POOLS.index(n)) for n, gpus in fastest.items()
            for row, choice in enumerate(plan.choices) if choice.gpus == gpus]  # fmt: skip
    title = (
        f"whole table: {plan.domains} domains x {plan.seeds} seeds x {', '.join(plan.methods)} = "
        f"{plan.runs} runs; hours until all are done on N GPUs, the fastest marked "
        f"({'measured' if plan.measured else 'assumed'} rates, "
        f"evaluations {'' if plan.evaluated else 'not '}counted)"
    )
    Table(columns, rows, title, align="rrrlr", bold=bold, mark=" *").show(console)
    console.out(
        "an array with N GPUs a run: the line of python -m trainer.sweep.slurm_array, with "
        "--nodes=1 --ntasks-per-node=N --gpus-per-node=N after sbatch"
    )


def show(plan: Plan, request: Request) -> None:
    """Prints the plan: JSON, or tables."""
    console = output_console()
    if request.json:
        console.out(json.dumps(asdict(plan) | {"trainable": plan.trainable}))
        return
    for title, rows in sections(plan, request.gpu_memory).items():
        Table(("", "", ""), rows, title, align="lrl").show(console)
    if plan.run_folder:
        console.out(f"run folder: {plan.run_folder}")
    for warning in plan.warnings:
        console.out(f"warning: {warning}")
