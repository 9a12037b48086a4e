"""What models say to every sample of a split, each sample once whatever the world size.

The counts of `trainer.evaluate.evaluator` are enough for accuracies; this keeps the scores
themselves, for confusion matrices, calibration and ensembles.

Letters: S samples of the split, C classes, n samples of this rank.
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
    evaluator's device and keep their modes. The scores of a rank's own samples stay on the CPU
    until the end, so device memory does not grow with the split on a single process, and by one
    model's scores on several.

    Raises:
        DamagedDataError: too many images could not be used; on all ranks alike.
        EvaluationBrokenOff: the evaluator's `pause` ended it.
    """
    number, nothing = evaluator.number(env, split), torch.empty(0, dtype=torch.int64)
    # A rank without samples takes part with empty tensors.
    logits = [[torch.empty(0, len(evaluator.index.classes))] for _ in models]
    labels, places, unusable = [nothing], [nothing], 0
    with evaluating(*models):
        for batch in evaluator.batches(models, env, split):
            images = batch.images.to(evaluator.device, evaluator.dtype)
            for model, own in zip(models, logits, strict=True):
                own.append(model(images).float().cpu())
            labels.append(batch.labels)
            places.append(torch.arange(len(batch.labels)) + batch.first_slot)
            unusable += batch.substituted
    where = torch.cat(places)

    def gathered(parts: list[Tensor]) -> Tensor:
        """Rows of all ranks [S, ...] from this rank's [n, ...] at its places; on the CPU.

        A sum with zeros, which is exact, and needs no agreement on how many rows each rank has.
        """
        own = torch.cat(parts)
        whole = own.new_zeros(number, *own.shape[1:])
        whole.index_add_(0, where, own)  # adds, so that a sample met twice would show
        return evaluator.sum_over_ranks(whole.to(evaluator.device)).cpu()

    times = gathered([torch.ones_like(where)])
    assert bool((times == 1).all()), "every sample must be evaluated exactly once"
    truth = gathered(labels)
    bad = int(evaluator.sum_over_ranks(torch.tensor([unusable], device=evaluator.device)))
    evaluator.check_usable(env, split, bad, number)
    return [Predictions(gathered(own), truth, bad) for own in logits]
