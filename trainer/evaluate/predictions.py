"""What models say to every sample of a split, and the figures of it; calibration among them.

The counts of `trainer.evaluate.evaluator` are enough for accuracies; this keeps the scores, each
sample's once whatever the world size, for confusion matrices, calibration and ensembles.

Letters: S samples of the split, C classes, B bins of equal width over the confidence in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.evaluate.evaluator import Evaluator, evaluating

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BINS = 15
"""As in Guo et al., "On calibration of modern neural networks" (arXiv 1706.04599)."""


@dataclass(frozen=True)
class Predictions:
    """What one model says to every sample of a split, on the CPU.

    Attributes:
        logits: float32 [S, C], in the order of the split.
        labels: int64 [S].
        unusable: how many images were replaced by a grey one.
    """

    logits: Tensor
    labels: Tensor
    unusable: int = 0


def collect(
    evaluator: Evaluator, models: Sequence[nn.Module], env: int, split: str
) -> list[Predictions]:
    """What each of some models says to the samples of a split; images are loaded only once.

    A collective over the processes, with the same result on all of them. The models are on the
    evaluator's device and keep their modes. The scores stay on the CPU until the end, so device
    memory does not grow with the split on a single process, and by one model's scores on several.

    Raises:
        DamagedDataError: too many images could not be used; on all ranks alike.
        EvaluationBrokenOff: the evaluator's `pause` ended it.
    """
    number = len(evaluator.ranks(env, split))
    # Each rank fills in its own samples. A sum with zeros is exact, and needs no agreement on how
    # many samples each has.
    times, labels = torch.zeros(2, number, dtype=torch.int64)
    pinned = evaluator.device.type == "cuda"  # so that copies need not be waited for
    logits = torch.zeros(len(models), number, len(evaluator.index.classes), pin_memory=pinned)
    unusable = 0
    with evaluating(*models):
        for _, (batch, images, *_) in evaluator.batches(models, [(env, split)]):
            own = slice(batch.first_slot, batch.first_slot + len(batch.labels))
            for model, scores in zip(models, logits, strict=True):
                scores[own].copy_(model(images).float(), non_blocking=True)
            labels[own] = batch.labels
            times[own] += 1
            unusable += batch.substituted
    torch.get_device_module(evaluator.device).synchronize()

    def summed(value: Tensor) -> Tensor:
        return evaluator.sum_over_ranks(value.to(evaluator.device)).cpu()

    assert bool((summed(times) == 1).all()), "every sample must be evaluated exactly once"
    truth, bad = summed(labels), int(summed(torch.tensor([unusable])))
    evaluator.check_usable(env, split, bad, number)
    return [Predictions(summed(scores), truth, bad) for scores in logits]


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy, in sums over the samples of each bin.

    Attributes:
        samples: int64 [B].
        confident: float64 [B], summed probabilities of the chosen class.
        right: float64 [B], right choices.
    """

    samples: Counts
    confident: Floats
    right: Floats

    @property
    def confidence(self) -> Floats:
        """Mean probability of the chosen class [B]; 0 in a bin without samples."""
        return self.confident / np.maximum(self.samples, 1)

    @property
    def accuracy(self) -> Floats:
        """Share of right choices [B]; 0 in a bin without samples."""
        return self.right / np.maximum(self.samples, 1)

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1]: mean of the samples' |accuracy - confidence|."""
        weights = self.samples / max(1, self.samples.sum())
        return float(np.sum(weights * np.abs(self.accuracy - self.confidence)))


@dataclass(frozen=True)
class Figures:
    """Counts and means over one split.

    Attributes:
        confusion: int64 [C, C], true class by row, predicted class by column.
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
        return float(np.nanmean(per_class_accuracy(self.confusion))) if self.samples else 0.0

    @property
    def ece(self) -> float:
        """Expected calibration error, in [0, 1]."""
        return self.reliability.ece

    def plain(self, classes: Sequence[str]) -> dict[str, Any]:
        """For JSON; a class without samples has the accuracy null."""
        shares = per_class_accuracy(self.confusion).tolist()
        return {
            "accuracy": self.accuracy, "correct": self.correct, "samples": self.samples,
            "unusable": self.unusable, "class_mean_accuracy": self.class_mean,
            "nll": self.nll, "ece": self.ece,
            "class_accuracy": {
                name: None if np.isnan(share) else share
                for name, share in zip(classes, shares, strict=True)
            },
            "reliability": {
                name: getattr(self.reliability, name).tolist()
                for name in ("samples", "confidence", "accuracy")
            },
            "confusion": self.confusion.tolist(),
        }  # fmt: skip


def figures_of(predictions: Predictions) -> Figures:
    """All figures of one model on one split."""
    logits, labels = predictions.logits.double(), predictions.labels
    nll = float(F.cross_entropy(logits, labels)) if len(labels) else 0.0
    bins = reliability(predictions)
    return Figures(confusion_matrix(predictions), bins, nll, predictions.unusable)


def total(parts: Sequence[Figures]) -> Figures:
    """The figures of several splits as one."""
    bins = [vars(part.reliability).values() for part in parts]
    return Figures(
        np.sum([p.confusion for p in parts], axis=0),
        Reliability(*(np.sum(sums, axis=0) for sums in zip(*bins, strict=True))),
        sum(p.nll * p.samples for p in parts) / max(1, sum(p.samples for p in parts)),
        sum(p.unusable for p in parts),
    )


def confusion_matrix(predictions: Predictions) -> Counts:
    """int64 [C, C]: how many samples of each class (row) were taken for each class (column)."""
    classes = predictions.logits.shape[1]
    cells = predictions.labels * classes + predictions.logits.argmax(1)
    return cells.bincount(minlength=classes**2).view(classes, classes).numpy()


def per_class_accuracy(confusion: Counts) -> Floats:
    """float64 [C] in [0, 1]; NaN for a class without samples."""
    with np.errstate(invalid="ignore"):
        shares: Floats = confusion.diagonal() / confusion.sum(1)
    return shares


def reliability(predictions: Predictions, bins: int = BINS) -> Reliability:
    """Sorts samples into bins (low, high] by the softmax probability of the chosen class."""
    best, chosen = predictions.logits.double().softmax(1).max(1)
    right, confidence = (chosen == predictions.labels).numpy(), best.numpy()
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    sums = [np.bincount(place, each, bins).astype(np.float64) for each in (confidence, right)]
    return Reliability(np.bincount(place, minlength=bins), *sums)
