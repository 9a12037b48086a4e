"""Timing for the benchmark: variants take turns, and only ratios within one run are compared."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Work = Callable[[], object]
Table = dict[str, dict[str, float | str]]
"""Variant -> column -> value."""


def interleaved(works: Mapping[str, Work], rounds: int, device: torch.device) -> Table:
    """Times every work once per round, so that whatever else the machine does meets all of them.

    Returns:
        Per work `ms`, the median wall-clock time, and `ratio`: the median over rounds of its time
        against that of the first work in the same round. The ratio is one of CPU time on a CPU,
        where other programs would spoil the clock, and of wall-clock time on a GPU.
    """
    wall: dict[str, list[float]] = {name: [] for name in works}
    busy: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):  # the first warms up
        for name, work in works.items():
            synchronize(device)
            started, used = time.perf_counter(), time.process_time()
            work()
            synchronize(device)
            if number:
                wall[name].append(time.perf_counter() - started)
                busy[name].append(time.process_time() - used)
    spent = wall if device.type == "cuda" else busy
    first = spent[next(iter(works))]
    return {
        name: {
            "ms": 1000 * statistics.median(wall[name]),
            "ratio": statistics.median(a / b for a, b in zip(spent[name], first, strict=True)),
        }
        for name in works
    }


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
