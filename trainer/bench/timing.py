"""Timing for the benchmark: variants take turns, and only ratios within one run are compared."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
Work = Callable[[], object]
Comparison = dict[str, dict[str, float | str]]
"""Variant -> column -> value."""


class Spent(NamedTuple):
    """Seconds that a piece of work took: by the clock, and of this process's CPU time."""

    wall: float
    cpu: float


def in_turns(
    works: Mapping[str, Work], rounds: int, device: torch.device
) -> dict[str, list[Spent]]:
    """Times every work once per round, so that whatever else the machine does meets all of them."""
    spent: dict[str, list[Spent]] = {name: [] for name in works}
    synchronize = torch.get_device_module(device).synchronize
    for number in range(rounds + 1):  # the first warms up
        for name, work in works.items():
            synchronize()
            started, used = time.perf_counter(), time.process_time()
            work()
            synchronize()
            if number:
                wall, cpu = time.perf_counter() - started, time.process_time() - used
                spent[name].append(Spent(wall, cpu))
    return spent


def milliseconds(work: Work, rounds: int, device: torch.device) -> float:
    """Median wall-clock time of one work alone."""
    return 1000 * statistics.median(each.wall for each in in_turns({"": work}, rounds, device)[""])


def interleaved(works: Mapping[str, Work], rounds: int, device: torch.device) -> Comparison:
    """Per work `ms`, the median wall-clock time, and `ratio` to the first work.

    That is the median over rounds of its time against that of the first in the same round: CPU time
    on a CPU, where other programs would spoil the clock, and wall-clock time on a GPU.
    """
    table: Comparison = {}
    first: list[float] = []
    for name, times in in_turns(works, rounds, device).items():
        spent = [each.wall if device.type == "cuda" else each.cpu for each in times]
        first = first or spent
        table[name] = {
            "ms": 1000 * statistics.median(each.wall for each in times),
            "ratio": statistics.median(a / b for a, b in zip(spent, first, strict=True)),
        }
    return table


def in_fresh_process(work: Callable[..., T], *args: Any) -> T:
    """What a call gives in a process of its own, whose peak memory is that of the call.

    It is a fork of one that has done the imports and nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *args).result()
