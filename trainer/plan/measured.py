"""What `--measured FILE` tells of a machine: steps that `trainer.bench` timed, and their rates."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.model import ModelConfig
from trainer.config.run_config import RunConfig
from trainer.process.errors import ConfigError

if TYPE_CHECKING:
    from trainer.plan.scaling import Rates

TITLE = re.compile(r"training step, (\S+), batch (\d{1,6}), (cpu|cuda), (float32|bfloat16)")
"""Of a table that `trainer.bench` writes; those of compiled or checkpointed blocks say more."""
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
HALF = 0.5
"""A step that computes at less than this share of the best rate is taken to wait for the host."""


@dataclass(frozen=True)
class MeasuredStep:
    """A forward, backward and update of `batch` images that someone timed."""

    backbone: str
    batch: int
    device: str
    precision: str
    method: str
    """First word of the variant's name."""
    seconds: float
    busy: float
    """Seconds that the device computed; as many as the step took where nobody looked."""
    operations: float


def read_measured(path: str, config: RunConfig, gpu: bool) -> tuple[MeasuredStep, ...]:
    """The steps in a file of `trainer.bench --part step --json` that a planned run is like.

    That is in precision, and in the device where `gpu` or the precision fixes it.

    Raises `ConfigError`: there is none, and why.
    """
    command = "python -m trainer.bench --part step"
    try:
        steps = list(_steps(json.loads(Path(path).read_text(encoding="utf-8"))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or repr(error)
        raise ConfigError(
            f"--measured: cannot read {path} ({reason}); give what {command} --json FILE writes"
        ) from error
    if not steps:
        raise ConfigError(
            f"--measured: {path} has no training step; give what {command} --json FILE writes"
        )
    precision = "fp32" if config.train.precision == "fp32" else "bf16"
    device = "cuda" if gpu or config.train.precision == "auto" else steps[0].device
    if like := [s for s in steps if (s.device, s.precision) == (device, precision)]:
        return tuple(like)
    other = ""
    if steps[0].device == device or not gpu:
        other = f", or plan for that with --train.precision {steps[0].precision}"
    raise ConfigError(
        f"--measured: {path} was measured on {steps[0].device} in {steps[0].precision}, and the "
        f"run is planned for {device} in {precision}; measure with {command} --device {device} "
        f"--precision {precision} --json FILE{other}"
    )


def _steps(tables: dict[str, Any]) -> Iterator[MeasuredStep]:
    for title, rows in tables.items():
        if found := TITLE.fullmatch(title):
            backbone, batch, device, dtype = found.groups()
            for name, row in rows.items():
                if isinstance(ms := row["ms"], str):  # out of memory
                    continue
                operations, busy = row["operations"], min(ms, row.get("busy ms", ms)) / 1000
                if 0 < busy <= ms < math.inf and 1 <= operations < 1e9 and int(batch):
                    kind = (backbone, int(batch), device, PRECISIONS[dtype], name.partition(" ")[0])
                    yield MeasuredStep(*kind, ms / 1000, busy, operations)


def measured_rates(steps: Sequence[MeasuredStep], config: RunConfig, assumed: "Rates") -> "Rates":
    """Rates of the run's backbone and method, or of whatever is nearest to them in the steps.

    The device's is the best that was reached, an operation's cost the least of steps that waited
    for their host; it stays as assumed where none did.

    Raises `ConfigError`: a backbone that nobody knows.
    """
    own = config.model.backbone.partition(".")[0]
    steps = [s for s in steps if s.backbone.partition(".")[0] == own] or steps
    flops = {name: _flops(name) for name in {s.backbone for s in steps}}
    reached = {s: flops[s.backbone] * s.batch / s.busy for s in steps}
    best = max(reached.values())
    steps = [s for s in steps if s.method == config.moa.method] or steps
    waited = [s for s in steps if s.busy < 0.9 * s.seconds or reached[s] < HALF * best]
    cost = min((s.seconds / s.operations for s in waited), default=assumed.operation)
    return replace(assumed, flops=max(reached[s] for s in steps), operation=cost)


def _flops(backbone: str) -> int:
    """Of an image's forward and backward; methods on a frozen backbone differ by a few per cent."""
    import moa
    from trainer.prepare.backbone import outline
    from trainer.prepare.footprint import measure

    try:
        settings = moa.MoAConfig(method="moa_lora")
        model = outline(ModelConfig(backbone=backbone), settings, 10)[0].model
    except (ConfigError, moa.MoAConfigError) as error:
        raise ConfigError(f"--measured: {error}") from error
    footprint = measure(model, 1, 1)
    return footprint.forward + footprint.backward
