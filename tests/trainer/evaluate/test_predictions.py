"""Predictions of whole splits, each sample once at any world size, and what is computed of them."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn

from shards import DataConfig, ShardIndex, eval_transform, evaluation_loader, open_shards
from trainer.config.model import ModelConfig
from trainer.evaluate.evaluator import Evaluator
from trainer.evaluate.predictions import (
    Predictions,
    collect,
    confusion_matrix,
    per_class_accuracy,
    reliability,
)
from trainer.prepare.backbone import Backbone, create_backbone
from trainer.process.world import World


@pytest.fixture(scope="module")
def index() -> ShardIndex:
    return open_shards(DataConfig())


@pytest.fixture(scope="module")
def backbones() -> list[Backbone]:
    return [create_backbone(ModelConfig(), 10, seed) for seed in (0, 1)]


def evaluator(
    index: ShardIndex, backbone: Backbone, world: World, total: Callable[[Tensor], Tensor]
) -> Evaluator:
    return Evaluator(
        index=index, data_config=backbone.data_config, trial_seed=1, holdout_fraction=0.2,
        batch_size=16, workers=0, world=world, device=torch.device("cpu"), dtype=torch.float32,
        sum_over_ranks=total,
    )  # fmt: skip


def alone(index: ShardIndex, backbone: Backbone) -> Evaluator:
    return evaluator(index, backbone, World(0, 1, 0, 1), lambda value: value)


def test_predictions_are_the_models_scores_in_the_splits_order(
    index: ShardIndex, backbones: list[Backbone]
) -> None:
    models = [backbone.model.train() for backbone in backbones]
    found = collect(alone(index, backbones[0]), models, 2, "out")
    batches = evaluation_loader(
        index, 2, "out", trial_seed=1, holdout_fraction=0.2, batch_size=7,
        transform=eval_transform(backbones[0].data_config),
    )  # fmt: skip
    images = torch.cat([batch.images for batch in batches])
    for model, predictions in zip(models, found, strict=True):
        assert model.training
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(predictions.logits, model(images), rtol=1e-5, atol=1e-5)
        assert predictions.labels.tolist() == [int(i) for b in batches for i in b.labels]
        assert predictions.unusable == 0


class Together:
    """Sums the tensors of some threads, as an all-reduce does."""

    def __init__(self, size: int) -> None:
        self.values: list[Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def member(self, rank: int) -> Callable[[Tensor], Tensor]:
        def total(value: Tensor) -> Tensor:
            self.values[rank] = value
            self.barrier.wait()
            summed = torch.stack([v for v in self.values if v is not None]).sum(0)
            self.barrier.wait()
            return summed

        return total


class Pixels(nn.Module):
    """Scores that cannot depend on how a batch is cut: the first pixels themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10, 10, bias=False)
        nn.init.eye_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(images[:, 0, 16, :10])
        return scores


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("size", [2, 3, 70])  # 59 samples: some of 70 ranks have none
def test_every_world_size_gives_the_predictions_of_one_process(
    index: ShardIndex, backbones: list[Backbone], size: int
) -> None:
    whole = alone(index, backbones[0])
    (expected,), counted = collect(whole, [Pixels()], 5, "out"), whole(Pixels(), [(5, "out")])
    together, found, counts = Together(size), {}, {}

    def rank(number: int) -> None:
        world = World(number, size, number, size)
        member = evaluator(index, backbones[0], world, together.member(number))
        (found[number],) = collect(member, [Pixels()], 5, "out")
        counts[number] = member(Pixels(), [(5, "out")])

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == size
    assert len(expected.labels) == 59
    assert all(of_rank == counted for of_rank in counts.values())
    right = counted[5, "out"]
    assert (right.correct, right.seen) == (confusion_matrix(expected).trace(), 59)
    balanced = balanced_accuracy_score(expected.labels, expected.logits.argmax(1))
    assert right.class_mean == pytest.approx(balanced, abs=1e-12)
    assert abs(right.class_mean - right.correct / right.seen) > 1e-4, "classes of unequal size"
    for predictions in found.values():
        assert torch.equal(predictions.logits, expected.logits)
        assert torch.equal(predictions.labels, expected.labels)


def random_predictions(samples: int, classes: int, sharpness: float) -> Predictions:
    generator = torch.Generator().manual_seed(samples)
    labels = torch.randint(classes - 1, (samples,), generator=generator)  # the last has no sample
    logits = torch.randn(samples, classes, generator=generator)
    logits[torch.arange(samples), labels] += 1
    return Predictions(sharpness * logits, labels)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
def test_calibration_error_is_that_of_torchmetrics(sharpness: float) -> None:
    from torchmetrics.functional import classification

    predictions = random_predictions(500, 7, sharpness)
    found = reliability(predictions).ece
    expected = classification.multiclass_calibration_error(
        predictions.logits.double().softmax(1), predictions.labels, num_classes=7, n_bins=15
    )
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_calibration_error_of_a_known_case() -> None:
    """Sure of everything by 0.75, right in one case of four."""
    logits = torch.tensor([[0.75, 0.25]] * 4).log()
    found = reliability(Predictions(logits, torch.tensor([0, 1, 1, 1])), bins=10)
    assert found.samples.tolist() == [0, 0, 0, 0, 0, 0, 0, 4, 0, 0]
    assert found.accuracy[7] == 0.25
    assert found.ece == pytest.approx(0.5)


def test_confusion_and_per_class_accuracy_count_by_hand() -> None:
    predictions = random_predictions(200, 4, 1.0)
    confusion = confusion_matrix(predictions)
    expected = np.zeros((4, 4), dtype=int)
    for scores, label in zip(predictions.logits.tolist(), predictions.labels.tolist(), strict=True):
        expected[label, scores.index(max(scores))] += 1
    assert confusion.tolist() == expected.tolist()
    shares = per_class_accuracy(confusion)
    assert shares[:3] == pytest.approx([expected[i, i] / expected[i].sum() for i in range(3)])
    assert np.isnan(shares[3])


def test_split_without_samples_has_no_figures(index: ShardIndex, backbones: list[Backbone]) -> None:
    whole = alone(index, backbones[0])
    empty = Evaluator(**{**vars(whole), "holdout_fraction": 0.0})
    (found,) = collect(empty, [backbones[0].model], 0, "out")
    assert found.logits.shape == (0, 10)
    assert confusion_matrix(found).sum() == 0
    assert reliability(found).ece == 0
