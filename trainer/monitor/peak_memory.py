"""The most memory that this process has held."""

import resource
import sys
from pathlib import Path

import torch

GIB = 2**30


def highest_resident() -> int:
    """Bytes of main memory that this process has held at most.

    On Linux not `getrusage`, whose figure a child process takes over from its parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text(encoding="ascii").partition("VmHWM:")[2].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_bytes(device: torch.device) -> int:
    """The most held so far: on a GPU what torch's allocator has given out, else main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return highest_resident()
