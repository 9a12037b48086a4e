"""Calibration: whether a model that is 80 % sure is right in 80 % of the cases.

Letters: S samples, C classes, B bins of equal width over the confidence in [0, 1].
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.evaluate.predictions import Predictions

Floats = npt.NDArray[np.float64]

BINS = 15
"""As in Guo et al., "On calibration of modern neural networks" (arXiv 1706.04599)."""


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy; a bin without samples has zeros.

    Attributes:
        samples: int64 [B].
        confidence: float64 [B], mean probability of the chosen class.
        accuracy: float64 [B], share of right choices.
    """

    samples: npt.NDArray[np.int64]
    confidence: Floats
    accuracy: Floats


def reliability(predictions: Predictions, bins: int = BINS) -> Reliability:
    """Sorts samples into bins (low, high] by the softmax probability of the chosen class."""
    best, chosen = predictions.logits.double().softmax(1).max(1)
    right = (chosen == predictions.labels).numpy().astype(np.float64)
    confidence = best.numpy()
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    samples = np.bincount(place, minlength=bins)
    divisor = np.maximum(samples, 1)
    return Reliability(
        samples,
        np.bincount(place, weights=confidence, minlength=bins) / divisor,
        np.bincount(place, weights=right, minlength=bins) / divisor,
    )


def expected_calibration_error(found: Reliability) -> float:
    """Mean over samples of their bin's |accuracy - confidence|, in [0, 1]; 0 without samples."""
    weights = found.samples / max(1, found.samples.sum())
    return float(np.sum(weights * np.abs(found.accuracy - found.confidence)))
