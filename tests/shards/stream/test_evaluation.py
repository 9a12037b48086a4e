from pathlib import Path

import pytest
import torch

from shards.errors import DataConfigError
from shards.pixels.decoding import decode_image
from shards.read.index import ShardIndex
from shards.stream.evaluation import evaluation_loader
from shards.stream.split import split_indices
from shards.writer import write_shards
from tests.support.shards_fixtures import (
    FOLDER,
    make_folder,
    make_set,
    pixels_only,
    small_train_transform,
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return make_set(tmp_path_factory.mktemp("evaluation"))


def load(index: ShardIndex, env: int, split: str, **changes: object):
    settings: dict[str, object] = {
        "trial_seed": 2,
        "holdout_fraction": 0.2,
        "transform": pixels_only,
        "batch_size": 4,
        **changes,
    }
    return evaluation_loader(index, env, split, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["in", "out", "all"])
@pytest.mark.parametrize("world", [1, 2, 3, 7, 50])
def test_every_sample_exactly_once(index: ShardIndex, split: str, world: int) -> None:
    env, total = 2, index.num_samples(2)
    inside, outside = split_indices(total, 2, env)
    ranks = {"in": inside, "out": outside, "all": range(total)}[split]
    expected = [index.read(env, int(rank)) for rank in ranks]
    place = 0
    for rank in range(world):
        for batch in load(index, env, split, rank=rank, world_size=world):
            assert batch.first_slot == place
            assert batch.substituted == 0
            assert 1 <= len(batch.labels) <= 4
            for image, label, domain in zip(batch.images, batch.labels, batch.domains, strict=True):
                assert torch.equal(image, decode_image(expected[place].image).float())
                assert (label, domain) == (expected[place].label, env)
                place += 1
    assert place == len(expected)


def test_ranks_without_samples_get_no_batch(index: ShardIndex) -> None:
    sizes = [
        sum(len(b.labels) for b in load(index, 0, "out", rank=rank, world_size=8, workers=rank % 2))
        for rank in range(8)
    ]
    assert sum(sizes) == int(index.num_samples(0) * 0.2) == 3
    assert sorted(set(sizes)) == [0, 1]
    assert len(load(index, 0, "out", rank=0, world_size=8)) == 0


def test_empty_split(index: ShardIndex) -> None:
    assert list(load(index, 0, "out", holdout_fraction=0.0)) == []


def test_workers_and_random_transforms_change_nothing(index: ShardIndex) -> None:
    """DomainBed validates with training augmentation; that too must be repeatable."""
    runs = [
        [b.images for b in load(index, 1, "all", transform=small_train_transform(), workers=w)]
        for w in (0, 0, 1, 2)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_random_state_of_the_model_is_left_alone(index: ShardIndex) -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    list(load(index, 1, "all", transform=small_train_transform()))
    assert torch.equal(torch.rand(2), expected)


def test_undecodable_image_still_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path / "images", domains=("art",))
    (root / "art/dog/im002.png").write_bytes(b"")
    index = write_shards(root, tmp_path / "out", FOLDER)
    batches = list(load(index, 0, "all", transform=small_train_transform()))
    assert sum(len(batch.labels) for batch in batches) == 18
    assert sum(batch.substituted for batch in batches) == 1
    list(load(index, 0, "all", transform=small_train_transform()))
    told = caplog.text.count("sample art-0000011 (folder-art-000000.tar, offset ")
    assert told == 1, "once, however often the set is evaluated"
    (bad,) = [sample for batch in batches for sample in batch.bad]
    assert (bad.domain, bad.key, bad.reason) == (0, "art-0000011", "undecodable")


def test_bad_arguments_are_refused(index: ShardIndex) -> None:
    with pytest.raises(DataConfigError, match="split = 'test': must be one of in, out, all"):
        load(index, 0, "test")
    with pytest.raises(DataConfigError, match="batch_size = 0: must be 1 or more"):
        load(index, 0, "all", batch_size=0)
    with pytest.raises(DataConfigError, match=r"rank = 2: must lie in \[0, 2\)"):
        load(index, 0, "all", rank=2, world_size=2)
