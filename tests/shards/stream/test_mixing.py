import json
from collections import Counter

import numpy as np
import pytest

from shards.errors import DataConfigError
from shards.read.index import ShardIndex
from shards.stream.split import split_indices
from tests.support.shards_fixtures import make_set, stream_of

GOLDEN = ["cd6fe00404db1d70", "1e4c83477591c4df", "5a37544008a66f87"]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("stream")
    return make_set(folder, domains=("art", "cartoon", "photo", "sketch"))


def test_keys_follow_the_definition(index: ShardIndex) -> None:
    """The whole rule once more, slot by slot, in plain Python."""
    from tests.shards.stream.test_order import scalar_hash, scalar_permutation

    stream = stream_of(index)
    assert stream.global_batch == 12
    for step in (0, 1, 5, 40):
        expected = []
        for slot in range(12):
            i, d = divmod(slot, 3)
            env = (0, 1, 3)[d]
            inside, _ = split_indices(index.num_samples(env), 1, env)
            epoch, place = divmod(step * 4 + i, len(inside))
            order = scalar_permutation(scalar_hash(5, index.domains[env], epoch), len(inside))
            expected.append(f"{index.domains[env]}-{inside[order[place]]:07d}")
        assert stream.keys(step) == expected


def test_every_training_sample_once_per_epoch_and_never_another(index: ShardIndex) -> None:
    stream = stream_of(index, batch_per_domain=1)
    for place, env in enumerate(stream.sources):
        length = stream.num_train(env)
        inside, _ = split_indices(index.num_samples(env), 1, env)
        wanted = {index.key(env, int(rank)) for rank in inside}
        for epoch in range(3):
            steps = range(epoch * length, (epoch + 1) * length)
            seen = Counter(stream.keys(step)[place] for step in steps)
            assert set(seen) == wanted
            assert set(seen.values()) == {1}


def test_domain_smaller_than_its_share_of_the_batch(index: ShardIndex) -> None:
    stream = stream_of(index, batch_per_domain=40)
    counts = Counter(key.rpartition("-")[0] for key in stream.keys(3))
    assert counts == {"art": 40, "cartoon": 40, "sketch": 40}
    assert stream.epochs(3) == {
        index.domains[env]: 120 / stream.num_train(env) for env in (0, 1, 3)
    }


def test_replacement_draws_differ_from_the_permutation(index: ShardIndex) -> None:
    stream = stream_of(index, mode="replacement", batch_per_domain=30)
    assert stream.keys(0) != stream_of(index, batch_per_domain=30).keys(0)
    assert len(set(stream.keys(0))) < 90
    assert stream.keys(0) == stream_of(index, mode="replacement", batch_per_domain=30).keys(0)


def test_windows_of_a_step_hold_all_it_reads(index: ShardIndex) -> None:
    stream = stream_of(index, mode="window", window=1)
    for step in range(40):
        read = set()
        for env, _, rank in zip(*stream.slots(step), strict=True):
            read.add(int(index.table(int(env))["shard"][rank]))
        live, following = stream.windows(step)
        assert read <= set(live)
        assert not set(live) & set(following)
        assert len(live) <= 8, "the windows of four positions cannot be all shards"
    everything = {int(shard) for env in (0, 1, 3) for shard in index.table(env)["shard"]}
    assert stream_of(index).windows(7) == (sorted(everything), [])


def test_digest_tells_steps_and_settings_apart(index: ShardIndex) -> None:
    stream = stream_of(index)
    digests = {stream.batch_digest(step) for step in range(100)}
    assert len(digests) == 100
    assert all(len(digest) == 16 for digest in digests)
    assert stream.batch_digest(7) == stream_of(index).batch_digest(7)
    for change in ({"seed": 6}, {"trial_seed": 0}, {"sources": [0, 1, 2]}, {"batch_per_domain": 5}):
        assert stream_of(index, **change).batch_digest(7) != stream.batch_digest(7)


def test_fingerprint_holds_what_determines_the_order(index: ShardIndex) -> None:
    fingerprint = stream_of(index).fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert len(json.dumps(fingerprint)) < 500
    assert fingerprint == stream_of(index).fingerprint()
    changes = [
        {"seed": 6},
        {"trial_seed": 0},
        {"sources": [0, 1, 2]},
        {"batch_per_domain": 5},
        {"mode": "replacement"},
        {"mode": "window", "window": 1},
        {"mode": "window", "window": 2},
        {"holdout_fraction": 0.3},
    ]
    for change in changes:
        assert stream_of(index, **change).fingerprint() != fingerprint


def test_world_sizes(index: ShardIndex) -> None:
    stream = stream_of(index)
    assert stream.legal_world_sizes() == [1, 2, 3, 4, 6, 12]
    stream.check_world_size(4)
    stream.check_world_size(4, 3)
    with pytest.raises(
        DataConfigError,
        match=r"world size 5 does not divide the global batch of 12 images \(3 source domains x 4\)"
        r"; legal: 1, 2, 3, 4, 6, 12",
    ):
        stream.check_world_size(5)
    with pytest.raises(
        DataConfigError, match=r"2 micro-batches .* 3 images per rank .* legal: 1, 3"
    ):
        stream.check_world_size(4, 2)
    with pytest.raises(DataConfigError, match="world size 5"):
        stream.loader(0, 1, 0, 5)
    with pytest.raises(DataConfigError, match=r"rank = 4: must lie in \[0, 4\)"):
        stream.loader(0, 1, 4, 4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sources": []}, "need at least one domain"),
        ({"sources": [1, 1]}, "each once"),
        ({"sources": [0, 4]}, r"domain number 4 must lie in \[0, 4\)"),
        ({"batch_per_domain": 0}, "train.batch_per_domain = 0: must be 1 or more"),
        (
            {"mode": "shuffle"},
            "data.order = 'shuffle': must be one of permutation, window, replacement",
        ),
        ({"mode": "window"}, "data.order_window = 0: order window needs the number of shards"),
        ({"window": 3}, "data.order_window = 3: only for data.order window, not permutation"),
        ({"holdout_fraction": 1.0}, "holdout_fraction = 1.0"),
    ],
)
def test_bad_arguments_are_refused(index: ShardIndex, change: dict, match: str) -> None:
    with pytest.raises(DataConfigError, match=match):
        stream_of(index, **change)


def test_golden_digest_of_a_run(index: ShardIndex) -> None:
    """Order, split, slots and keys together; does not depend on any image's bytes."""
    stream = stream_of(index)
    assert [stream.batch_digest(step) for step in (0, 1, 1000)] == GOLDEN
    assert np.unique([stream.batch_digest(step) for step in range(50)]).size == 50
