"""Rows of `metrics.jsonl` and curves: written when a step is known, while a later one runs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

import moa
from trainer.checkpoint.run_folder import RunFolder
from trainer.monitor.monitor import Monitor
from trainer.train.nonfinite import as_json


class _Told(NamedTuple):
    perf: dict[str, float]
    routing: dict[str, dict[str, Tensor]]


class Rows:
    """Brings together what the host saw of a step and what the device told of it later.

    Only the main rank has a `monitor`; without one nothing is written.
    """

    def __init__(self, folder: RunFolder, monitor: Monitor | None = None) -> None:
        self.folder, self.monitor = folder, monitor
        self.known: list[Mapping[str, Any]] = []
        self._told: dict[int, _Told] = {}

    def tell(self, step: int, images: int, took: float, waited: float, model: nn.Module) -> None:
        """Notes a step of so many images and seconds, `waited` of them for data.

        0 seconds stand for a step whose time says nothing, as of one that is profiled.
        """
        if self.monitor is None:
            return
        perf = {"step_ms": 1000 * took, "data_wait_ms": 1000 * waited}
        perf = perf | {"img_s": images / took} if took else {}
        shown = step % self.monitor.every == 0 or step == self.monitor.standing.total - 1
        stats = moa.routing_stats(model) if shown else {}
        self._told[step] = _Told(perf, {
            layer: {name: value.to("cpu", non_blocking=True) for name, value in values.items()}
            for layer, values in stats.items()
        })  # fmt: skip

    def write(self) -> None:
        """Writes what is known and not there yet.

        On a shared file system that takes its time; a GPU has the next step to do meanwhile.
        """
        known, self.known = self.known, []
        if self.monitor is None:
            return
        for row in known:
            self.folder.append(self.folder.metrics, as_json(row))
            told = self._told.pop(row["step"])
            self.monitor.step(row, told.perf)
            self.monitor.routing(row["step"], told.routing)
