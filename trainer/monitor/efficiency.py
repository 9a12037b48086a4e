"""How well a run uses its machine: FLOP utilisation, peak memory, the share of waiting for data."""

import logging
import re
import resource
import sys
from collections import deque
from pathlib import Path

import torch

from trainer.config.run_config import RunConfig
from trainer.prepare import footprint
from trainer.prepare.backbone import outline

log = logging.getLogger(__name__)

PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12,
    "B200": 2250e12, "A100": 312e12, "A800": 312e12, "A40": 150e12, "A30": 165e12, "A10G": 70e12,
    "A10": 125e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
    "RTX A6000": 155e12,
}  # fmt: skip
"""Dense bf16 FLOP/s that makers state, by whole words of the device's name; the first that fits
counts."""

WINDOW = 20
"""Steps that the share of waiting is taken over."""
DOMINATES, RECOVERED = 0.5, 0.25
"""Shares of the step time at which the hint is given, and below which it may be given again."""


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s of a device by its name; None if unknown, or in a precision other than bf16."""
    if precision != "bf16":
        return None
    return next((p for words, p in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)


def image_utilisation(
    config: RunConfig, device: torch.device, num_classes: int, ranks: int
) -> float | None:
    """Model FLOP utilisation per image and second, to be multiplied with the training speed.

    It is the useful FLOPs against what `ranks` such devices could do in that time: the matrix
    products of forward and backward, not what activation checkpointing computes a second time.

    Returns:
        None where nobody knows what the device could do, as on a CPU, or the FLOPs cannot be
        counted; a chart less must not end a run.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = peak_flops(name, config.train.precision)
    if peak is None:
        return None
    try:
        backbone, _ = outline(config.model, config.moa, num_classes)
        step = footprint.measure(backbone.model, 1, 1)
    except Exception as error:
        log.warning("no perf/mfu: FLOPs of %s cannot be counted (%s)", config.model.backbone, error)
        return None
    return (step.forward + step.backward) / (peak * ranks)


def highest_resident() -> int:
    """Bytes of main memory that this process has held at most.

    On Linux not `getrusage`, whose figure a child process takes over from its parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text(encoding="ascii").partition("VmHWM:")[2].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_gib(device: torch.device) -> float:
    """The most held so far: on a GPU what torch's allocator has given out, else main memory."""
    on_gpu = device.type == "cuda"
    return (torch.cuda.max_memory_allocated(device) if on_gpu else highest_resident()) / 2**30


class DataWait:
    """Share of the step time that went into waiting for data, over the last steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._told = False

    @property
    def share(self) -> float:
        """In [0, 1]; 0 before the first step."""
        took = sum(took for _, took in self._steps)
        return sum(waited for waited, _ in self._steps) / took if took else 0.0

    def note(self, waited: float, took: float) -> bool:
        """Takes in one step; whether it is time for the hint."""
        self._steps.append((waited, took))
        share = self.share
        if share < RECOVERED:
            self._told = False
        if self._told or share < DOMINATES or len(self._steps) < WINDOW:
            return False
        self._told = True
        return True


def hint(share: float, config: RunConfig, cores: int) -> str:
    """What the user may do about waiting for data, on so many CPU cores for this process."""
    data = config.data
    remedies = [f"raise --data.workers (now {data.workers} per process, on {cores} CPU cores)"]
    if data.augment_on != "device":
        remedies.append("move the colour augmentation with --data.augment_on device")
    remedies.append("bring the shards to a faster disk")
    return f"data waiting takes {100 * share:.0f} % of the step time: " + ", or ".join(remedies)
