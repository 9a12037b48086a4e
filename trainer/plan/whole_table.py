"""What a whole table costs: every domain held out, by seeds and methods, with 1 to 8 GPUs a run."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.config.run_config import RunConfig
from trainer.plan.data import Request
from trainer.plan.planning import Plan, make_plan

GPUS_A_RUN = (1, 2, 4, 8)
POOLS = (1, 2, 4, 8, 16, 32, 64, 128)
"""GPUs on which the table is made."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The table with so many GPUs a run."""

    gpus: int
    gpu_bytes: int
    """Of the method that needs most."""
    step_seconds: float
    """Of the slowest method."""
    bound: str
    """What sets its pace."""
    run_seconds: float
    """Of its training and evaluations."""
    gpu_hours: float
    """Of all runs."""
    wall_hours: dict[int, float]
    """By GPUs at hand, those that hold a run."""


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """Runs of a table, and the choices."""

    domains: int
    seeds: int
    methods: tuple[str, ...]
    measured: bool
    evaluated: bool
    """Whether evaluations are counted, for which sizes have to be known."""
    choices: tuple[Choice, ...]

    @property
    def runs(self) -> int:
        """Runs of the table."""
        return self.domains * self.seeds * len(self.methods)

    def fastest(self, pool: int, gpu_memory: float | None) -> int | None:
        """GPUs a run with which the table is first done, the fewest of equals; None: none fits."""
        fitting = [
            c for c in self.choices
            if pool in c.wall_hours and not (gpu_memory and c.gpu_bytes > gpu_memory * 2**30)
        ]  # fmt: skip
        return min(fitting, key=lambda c: c.wall_hours[pool]).gpus if fitting else None


def plan_table(config: RunConfig, request: Request) -> TablePlan:
    """Plans a run of every method on every number of GPUs that can share its batch.

    Raises what `make_plan` raises.
    """
    methods, seeds = request.methods, request.seeds
    configs = [
        replace(config, moa=replace(config.moa, method=name))  # type: ignore[arg-type]
        for name in methods
    ]
    first = make_plan(configs[0], request)
    legal = {p.world for p in first.predictions}
    runs, choices = first.batches.domains * seeds, []
    for gpus in (n for n in GPUS_A_RUN if n in legal):
        plans = [make_plan(each, replace(request, world_size=gpus)) for each in configs]
        choices.append(_choice(gpus, plans, runs))
    return TablePlan(
        domains=first.batches.domains,
        seeds=seeds,
        methods=methods,
        measured=first.measured,
        evaluated=first.images_evaluated > 0,
        choices=tuple(choices),
    )


def _choice(gpus: int, plans: Sequence[Plan], runs: int) -> Choice:
    """Makes so many runs of every planned method."""
    seconds = [_run_seconds(plan, gpus) for plan in plans]
    slowest = plans[seconds.index(max(seconds))]
    (step,) = (p for p in slowest.predictions if p.world == gpus)
    in_turn = [one for one in seconds for _ in range(runs)]
    return Choice(
        gpus=gpus,
        gpu_bytes=max(plan.gpu_bytes for plan in plans),
        step_seconds=step.seconds,
        bound=step.bound,
        run_seconds=max(seconds),
        gpu_hours=gpus * sum(in_turn) / 3600,
        wall_hours={n: makespan(in_turn, n // gpus) / 3600 for n in POOLS if n >= gpus},
    )


def _run_seconds(plan: Plan, gpus: int) -> float:
    """Training and evaluations, which wait for the device or for the loaders."""
    (step,) = (p for p in plan.predictions if p.world == gpus)
    image = plan.footprint.forward / plan.rates.flops
    if plan.load.loaders:
        image = max(image, 1 / (plan.load.loaders * plan.rates.loader))
    return plan.batches.steps * step.seconds + plan.images_evaluated * image / gpus


def makespan(seconds: Sequence[float], places: int) -> float:
    """Until the last run is over, if each in turn takes the first place that is free."""
    ends = [0.0] * places
    for one in seconds:
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)
