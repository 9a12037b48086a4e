"""What a step asks of host and device: operations and waits, on a GPU kernels and busy time."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.prepare.meter import computes

_READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_CALLS = ("cuda_runtime", "cuda_driver")
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")  # of the device only those who measure


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that compute something, and those whose result the host reads."""

    operations = reads = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.operations += computes(func)
        self.reads += func.overloadpacket.__name__ in _READS
        return func(*args, **(kwargs or {}))


class _ListCounter(TorchFunctionMode):
    """Counts `tolist`, which on a CPU is no operation."""

    lists = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.lists += func is Tensor.tolist
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(device: torch.device, steps: int) -> Iterator[dict[str, float | str]]:
    """Gives a dictionary that holds, when the block ends, what each of its `steps` asked for.

    On a CPU `operations`, and `host reads` of values, at which a GPU would be waited for unless the
    tensor lies on the host anyway, as Adam's counters of steps do. On a GPU what `of_trace` finds.
    """
    found: dict[str, float | str] = {}
    if device.type != "cuda":
        with OperationCounter() as counter, _ListCounter() as lists:  # type: ignore[no-untyped-call]
            yield found
        found["operations"] = counter.operations / steps
        found["host reads"] = (counter.reads + lists.lists) / steps
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        yield found
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        found |= of_trace(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"], steps)


def of_trace(events: Sequence[Mapping[str, Any]], steps: int) -> dict[str, float | str]:
    """Figures a step from the events of torch's profiler.

    `busy ms` is the time in which at least one kernel or copy is under way, `waited ms` that of the
    host in its `host waits`; a graph is one of `launches` and many of `kernels`.
    """
    kernels = [event for event in events if event.get("cat") in _ON_DEVICE]
    calls = [event for event in events if event.get("cat") in _CALLS]
    waits = [event for event in calls if event["name"] in _WAITS]
    busy, until = 0.0, 0.0
    for start, end in sorted((each["ts"], each["ts"] + each["dur"]) for each in kernels):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return {
        "busy ms": busy / steps / 1000,
        "kernels": len(kernels) / steps,
        "launches": sum("Launch" in call["name"] for call in calls) / steps,
        "host waits": len(waits) / steps,
        "waited ms": sum(wait["dur"] for wait in waits) / steps / 1000,
    }
