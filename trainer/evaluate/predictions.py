"""What models say to every sample of a split, each sample once whatever the world size.

The counts of `trainer.evaluate.evaluator` are enough for accuracies; this keeps the scores
themselves, for confusion matrices, calibration, ensembles and pictures of the features.

Letters: S samples of the split, C classes, D width of the features, n samples of this rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn import metrics
from torch import Tensor, nn

from moa.model.injection import classifier
from trainer.evaluate.evaluator import Evaluator, evaluating

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """What one model says to every sample of a split, on the CPU.

    Attributes:
        logits: float32 [S, C], in the order of the split.
        labels: int64 [S].
        unusable: how many images were replaced by a grey one.
        features: float32 [S, D], what the classifier gets to see; None if not asked for.
    """

    logits: Tensor
    labels: Tensor
    unusable: int = 0
    features: Tensor | None = None


def collect(
    evaluator: Evaluator, models: Sequence[nn.Module], env: int, split: str, features: bool = False
) -> list[Predictions]:
    """What each of some models says to the samples of a split; images are loaded only once.

    A collective over the processes, with the same result on all of them. The scores of a rank's own
    samples stay on the CPU until the end, so device memory does not grow with the split on a single
    process, and by one model's scores on several.

    Args:
        evaluator: data, device and world.
        models: on the evaluator's device; each keeps its mode.
        env: number of the domain.
        split: `in`, `out`, `all` or `left_out`.
        features: whether to keep the classifier's input as well.

    Raises:
        DamagedDataError: too many images could not be used; on all ranks alike.
        EvaluationBrokenOff: the evaluator's `pause` ended it.
    """
    total = evaluator.number(env, split)
    own = [_Own(len(evaluator.index.classes), model if features else None) for model in models]
    labels, places, unusable = [], [], 0
    with evaluating(*models):
        for batch in evaluator.batches(models, env, split):
            images = batch.images.to(evaluator.device, evaluator.dtype)
            for model, kept in zip(models, own, strict=True):
                with kept.listening():
                    kept.logits.append(model(images).float().cpu())
            labels.append(batch.labels)
            places.append(torch.arange(len(batch.labels)) + batch.first_slot)
            unusable += batch.substituted

    def gathered(value: Tensor) -> Tensor:
        return _gathered(value, where, total, evaluator.sum_over_ranks, evaluator.device)

    where = torch.cat([torch.empty(0, dtype=torch.int64), *places])
    seen = gathered(torch.ones_like(where))
    assert bool((seen == 1).all()), "every sample must be evaluated exactly once"
    truth = gathered(torch.cat([torch.empty(0, dtype=torch.int64), *labels]))
    bad = int(evaluator.sum_over_ranks(torch.tensor([unusable], device=evaluator.device)))
    evaluator.check_usable(env, split, bad, total)
    return [
        Predictions(
            gathered(kept.all_logits()), truth, bad,
            gathered(kept.all_features()) if features else None,
        )
        for kept in own
    ]  # fmt: skip


class _Own:
    """One model's scores, and features if `model` is given, for this rank's samples."""

    def __init__(self, num_classes: int, model: nn.Module | None) -> None:
        self.num_classes = num_classes
        self.head = None if model is None else classifier(model)
        self.logits: list[Tensor] = []
        self.features: list[Tensor] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keeps what goes into the classifier within the block."""
        if self.head is None:
            yield
            return

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.features.append(inputs[0].float().cpu())

        handle = self.head.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def all_logits(self) -> Tensor:
        """[n, C]."""
        return torch.cat([torch.empty(0, self.num_classes), *self.logits])

    def all_features(self) -> Tensor:
        """[n, D]; a rank without samples knows D as well, and takes part with none."""
        assert self.head is not None
        width = int(self.head.in_features)  # type: ignore[arg-type]
        return torch.cat([torch.empty(0, width), *self.features])


def _gathered(
    own: Tensor,
    where: Tensor,
    total: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Tensor:
    """Rows of all ranks [total, ...] from this rank's [n, ...] at its places; on the CPU.

    A sum with zeros, which is exact, and needs no agreement on how many rows each rank has.
    """
    whole = own.new_zeros(total, *own.shape[1:])
    whole.index_add_(0, where, own)  # adds, so that a sample met twice would show
    return sum_over_ranks(whole.to(device)).cpu()


def confusion_matrix(predictions: Predictions) -> Counts:
    """int64 [C, C]: how many samples of each class (row) were taken for each class (column)."""
    num_classes = predictions.logits.shape[1]
    if not len(predictions.labels):
        return np.zeros((num_classes, num_classes), dtype=np.int64)
    chosen = predictions.logits.argmax(1).numpy()
    matrix: Counts = metrics.confusion_matrix(
        predictions.labels.numpy(), chosen, labels=np.arange(num_classes)
    )
    return matrix


def per_class_accuracy(confusion: Counts) -> Floats:
    """float64 [C] in [0, 1]; NaN for a class without samples."""
    samples = confusion.sum(1)
    share = np.full(len(samples), np.nan)
    np.divide(confusion.diagonal(), samples, out=share, where=samples > 0)
    return share
