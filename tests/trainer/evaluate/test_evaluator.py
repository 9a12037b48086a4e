"""The loader of evaluations: its processes stay, and numbers do not depend on them."""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import Process

from shards import Batch, ShardIndex
from tests.support.shards_fixtures import DATA_CONFIG, make_set
from trainer.evaluate.evaluator import Evaluator
from trainer.evaluate.predictions import collect
from trainer.prepare.ahead import Ahead, Ready
from trainer.process.stopping import EvaluationBrokenOff
from trainer.process.world import ALONE


class Brightness(nn.Module):
    """Takes light images for the second class."""

    def forward(self, images: Tensor) -> Tensor:
        light = images.mean((1, 2, 3))
        return torch.stack([-light, light], 1)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return make_set(tmp_path_factory.mktemp("evaluator"))


def evaluator(index: ShardIndex, workers: int) -> Evaluator:
    return Evaluator(
        index=index, data_config=DATA_CONFIG, trial_seed=1, holdout_fraction=0.3, batch_size=3,
        workers=workers, world=ALONE, device=torch.device("cpu"), dtype=torch.float32,
        sum_over_ranks=torch.clone, losses=True,
    )  # fmt: skip


def test_loader_processes_stay_for_all_cells_and_evaluations(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, model = [], Brightness()
    monkeypatch.setattr(Process, "start", counted(Process.start, started))
    alone, fed = evaluator(index, 0), evaluator(index, 2)
    expected = alone.with_losses(model)
    assert not started
    assert len(expected[0]) == 6
    assert all(loss > 0 for loss in expected[1].values())
    assert fed.with_losses(model) == expected
    watching = replace(fed, note=lambda *_: None)  # as each evaluation of a run has one
    assert watching.with_losses(model) == expected
    part = [(2, "out"), (0, "in")]
    assert fed(model, part) == {place: expected[0][place] for place in part}
    for place in part:
        (found,), (same,) = collect(fed, [model], *place), collect(alone, [model], *place)
        assert torch.equal(found.logits, same.logits)
    assert len(started) == 2

    def broken_off() -> None:
        raise EvaluationBrokenOff

    with pytest.raises(EvaluationBrokenOff):
        replace(fed, pause=broken_off)(model)
    assert fed.with_losses(model) == expected, "nothing is left of what was prefetched"
    assert len(started) == 2
    assert replace(fed, holdout_fraction=0.0)(model)[0, "out"] == (0, 0, 0, 0.0)


def counted(start, started: list[int]):  # type: ignore[no-untyped-def]
    def starting(process: Process) -> None:
        started.append(os.getpid())
        start(process)

    return starting


def test_batches_of_an_evaluation_are_bytes(index: ShardIndex) -> None:
    found = [ready for _, ready in evaluator(index, 1).batches([], [(0, "in")])]
    for batch, images, *_ in found:
        assert batch.images.nbytes == len(batch.labels) * 3 * 24 * 24
        assert batch.images.is_shared()
        assert batch.colour is None
        assert (images.dtype, images.shape[1:]) == (torch.float32, (3, 24, 24))


def test_the_next_batch_is_prepared_before_the_last_one_is_done(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all splits of an evaluation, which begins anew after one that was broken off."""
    events: list[str] = []
    prepared = Ahead._prepared

    def seen(self: Ahead, batch: Batch) -> Ready:
        events.append("prepared")
        return prepared(self, batch)

    monkeypatch.setattr(Ahead, "_prepared", seen)
    places = [(0, "in"), (0, "out"), (1, "out")]
    for _ in evaluator(index, 0).batches([], places):
        events.append("used")
    assert events == ["prepared", *["used", "prepared"] * (len(events) // 2 - 1), "used"]
    assert len(events) > 6
