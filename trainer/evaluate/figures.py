"""The figures of one model on one split, from its predictions; calibration among them.

Letters: S samples, C classes, B bins of equal width over the confidence in [0, 1].
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.nn import functional as F

from trainer.evaluate.predictions import Counts, Predictions, confusion_matrix, per_class_accuracy

Floats = npt.NDArray[np.float64]


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


@dataclass(frozen=True)
class Figures:
    """Counts and means over one split.

    Attributes:
        confusion: int64 [C, C], true class by row, chosen class by column.
        reliability: confidence against accuracy.
        nll: mean negative log-likelihood of the true class, in nats; 0 without samples.
        unusable: images that could not be used; a grey one stands for each, and counts as guessed.
    """

    confusion: Counts
    reliability: Reliability
    nll: float
    unusable: int

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """How many of them were classified right."""
        return int(self.confusion.trace())

    @property
    def accuracy(self) -> float:
        """In [0, 1]; 0 without samples, as in DomainBed's rows."""
        return self.correct / self.samples if self.samples else 0.0

    @property
    def class_mean(self) -> float:
        """Mean of the accuracies of the classes that occur, in [0, 1]."""
        shares = per_class_accuracy(self.confusion)
        return float(np.nanmean(shares)) if self.samples else 0.0

    @property
    def ece(self) -> float:
        """Expected calibration error, in [0, 1]."""
        return expected_calibration_error(self.reliability)

    def plain(self, classes: tuple[str, ...]) -> dict[str, Any]:
        """For JSON; a class without samples has the accuracy null."""
        shares = per_class_accuracy(self.confusion)
        bins = self.reliability
        return {
            "accuracy": self.accuracy,
            "correct": self.correct,
            "samples": self.samples,
            "unusable": self.unusable,
            "class_mean_accuracy": self.class_mean,
            "nll": self.nll,
            "ece": self.ece,
            "class_accuracy": {
                name: None if np.isnan(share) else float(share)
                for name, share in zip(classes, shares, strict=True)
            },
            "reliability": {
                "samples": bins.samples.tolist(),
                "confidence": bins.confidence.tolist(),
                "accuracy": bins.accuracy.tolist(),
            },
            "confusion": self.confusion.tolist(),
        }


def figures_of(predictions: Predictions) -> Figures:
    """All figures of one model on one split."""
    labels = predictions.labels
    nll = float(F.cross_entropy(predictions.logits.double(), labels)) if len(labels) else 0.0
    return Figures(
        confusion_matrix(predictions), reliability(predictions), nll, predictions.unusable
    )


def total(parts: list[Figures]) -> Figures:
    """The figures of several splits as one."""
    samples = np.sum([p.reliability.samples for p in parts], axis=0)
    divisor = np.maximum(samples, 1)
    bins = [p.reliability for p in parts]
    number = max(1, sum(p.samples for p in parts))
    return Figures(
        np.sum([p.confusion for p in parts], axis=0),
        Reliability(
            samples,
            np.sum([b.samples * b.confidence for b in bins], axis=0) / divisor,
            np.sum([b.samples * b.accuracy for b in bins], axis=0) / divisor,
        ),
        sum(p.nll * p.samples for p in parts) / number,
        sum(p.unusable for p in parts),
    )


BINS = 15
"""As in Guo et al., "On calibration of modern neural networks" (arXiv 1706.04599)."""


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
