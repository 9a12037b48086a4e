"""What models say to every sample of a split, each sample once whatever the world size.

The counts of `trainer.evaluate.evaluator` are enough for accuracies; this keeps the scores
themselves, for confusion matrices, calibration and ensembles.

Letters: S samples of the split, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.evaluate.evaluator import Evaluator, evaluating


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
    logits, unusable = torch.zeros(len(models), number, len(evaluator.index.classes)), 0
    with evaluating(*models):
        for batch in evaluator.batches(models, env, split):
            images = batch.images.to(evaluator.device, evaluator.dtype)
            own = slice(batch.first_slot, batch.first_slot + len(batch.labels))
            for model, scores in zip(models, logits, strict=True):
                scores[own] = model(images).float().cpu()
            labels[own] = batch.labels
            times[own] += 1
            unusable += batch.substituted

    def summed(value: Tensor) -> Tensor:
        return evaluator.sum_over_ranks(value.to(evaluator.device)).cpu()

    assert bool((summed(times) == 1).all()), "every sample must be evaluated exactly once"
    truth, bad = summed(labels), int(summed(torch.tensor([unusable])))
    evaluator.check_usable(env, split, bad, number)
    return [Predictions(summed(scores), truth, bad) for scores in logits]
