"""Model FLOP utilisation: a step's useful FLOPs against what the devices could do in its time."""

import logging
import re

import torch

from trainer.config.run_config import RunConfig
from trainer.prepare import footprint
from trainer.prepare.backbone import outline

log = logging.getLogger(__name__)

PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "RTX A6000": 155e12,
}
"""Dense bf16 FLOP/s that makers state, by whole words of the device's name; the first that fits
counts."""


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s of a device by its name; None if unknown, or in a precision other than bf16."""
    if precision != "bf16":
        return None
    return next((p for words, p in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)


def image_utilisation(
    config: RunConfig, device: torch.device, num_classes: int, ranks: int
) -> float | None:
    """Utilisation per image and second, to be multiplied with the training speed.

    Counted are the matrix products of forward and backward, not what activation checkpointing
    computes a second time.

    Args:
        config: the run, resolved.
        device: where this process computes.
        num_classes: classes of the head.
        ranks: processes that train, each with such a device.

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
