"""The next batch is fetched early, and what goes wrong in fetching it is told late."""

from collections.abc import Iterator

import pytest
import torch

from shards import Batch
from shards.errors import DamagedDataError
from tests.support.shards_fixtures import DATA_CONFIG
from trainer.prepare.ahead import Ahead


def batch(number: int) -> Batch:
    images = torch.full((2, 3, 4, 4), number, dtype=torch.uint8)
    labels = torch.tensor([number, number])
    return Batch(images, labels, labels, first_slot=number, substituted=0, bad=[])


def test_errors_wait_until_the_batch_is_wanted() -> None:
    taken = []

    def batches() -> Iterator[Batch]:
        for number in range(2):
            taken.append(number)
            yield batch(number)
        raise DamagedDataError("the third")

    source, ahead = batches(), Ahead(torch.device("cpu"), torch.bfloat16, DATA_CONFIG)
    assert ahead.take(source).batch.first_slot == 0
    ahead.fetch(source)
    ahead.fetch(source)
    assert taken == [0, 1], "one at a time"
    ready = ahead.take(source)
    assert ready.labels.tolist() == [1, 1]
    assert ready.images.dtype == torch.bfloat16
    ahead.fetch(source)
    with pytest.raises(DamagedDataError, match="the third"):
        ahead.take(source)
