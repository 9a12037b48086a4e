"""What is counted of a step, on a CPU and in the trace of a GPU."""

from typing import Any

import pytest
import torch

from trainer.bench.counting import counted, of_trace


def test_operations_and_reads_of_a_step() -> None:
    x = torch.ones(2, 2)
    with counted(torch.device("cpu"), 2) as found:
        for _ in range(2):
            y = (x @ x).view(4) + 1  # a view computes nothing
            y.tolist()
            y.sum().item()
    assert found == {"operations": 4, "host reads": 2}  # item is an operation of its own


def event(kind: str, name: str, start: float, took: float) -> dict[str, Any]:
    return {"cat": kind, "name": name, "ts": start, "dur": took}


def test_a_trace_tells_busy_time_once() -> None:
    """Kernels that overlap keep the device busy once, and a graph is one launch."""
    found = of_trace(
        [
            event("kernel", "gemm", 1000, 2000),
            event("kernel", "add", 2000, 3000),
            event("kernel", "inner", 2500, 100),
            event("gpu_memcpy", "Memcpy DtoH", 9000, 1000),
            event("cuda_runtime", "cudaGraphLaunch", 0, 10),
            event("cuda_driver", "cuLaunchKernelEx", 20, 10),
            event("cuda_runtime", "cudaMemcpyAsync", 40, 10),
            event("cuda_runtime", "cudaStreamSynchronize", 100, 6000),
            event("cuda_runtime", "cudaDeviceSynchronize", 100, 9000),
            {"name": "process_name", "ph": "M"},
        ],
        steps=2,
    )
    assert found == {
        "busy ms": pytest.approx(2.5),
        "kernels": 2,
        "launches": 1,
        "host waits": 0.5,
        "waited ms": pytest.approx(3),
    }
