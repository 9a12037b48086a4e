import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from shards_fixtures import (
    FOLDER,
    damage,
    image_bytes,
    make_folder,
    make_set,
    pixels_only,
    small_train_transform,
)

from shards.errors import DamagedDataError, DataConfigError
from shards.index import ShardIndex
from shards.order import substitute_index
from shards.split import split_indices
from shards.stream import DomainStream
from shards.writer import write_shards

GOLDEN = ["cd6fe00404db1d70", "1e4c83477591c4df", "5a37544008a66f87"]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("stream")
    return make_set(folder, domains=("art", "cartoon", "photo", "sketch"))


def stream_of(index: ShardIndex, **changes: object) -> DomainStream:
    settings: dict[str, object] = {
        "sources": [0, 1, 3],
        "batch_per_domain": 4,
        "seed": 5,
        "trial_seed": 1,
        "transform": small_train_transform(),
        **changes,
    }
    return DomainStream(index, **settings)  # type: ignore[arg-type]


def test_keys_follow_the_definition(index: ShardIndex) -> None:
    """The whole rule once more, slot by slot, in plain Python."""
    from test_shards_order import scalar_hash, scalar_permutation

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
        {"holdout_fraction": 0.3},
    ]
    for change in changes:
        assert stream_of(index, **change).fingerprint() != fingerprint


def collect(stream: DomainStream, start: int, stop: int, world: int = 1, **options: int):
    """Global batches: the ranks' micro-batches put together; checks first_slot on the way."""
    ranks = [list(stream.loader(start, stop, rank, world, **options)) for rank in range(world)]
    pieces = options.get("accumulation", 1)
    batches = []
    for step in range(stop - start):
        parts = [part for rank in ranks for part in rank[step * pieces : (step + 1) * pieces]]
        slot = 0
        for part in parts:
            assert part.first_slot == slot
            slot += len(part.labels)
        assert slot == stream.global_batch
        batches.append(
            tuple(torch.cat([getattr(part, name) for part in parts]) for name in part._fields[:3])
        )
    return batches


def assert_equal(left: list, right: list) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_batches_hold_what_the_keys_say(index: ShardIndex) -> None:
    stream = stream_of(index, transform=pixels_only)
    for step, batch in enumerate(stream.loader(2, 5), start=2):
        assert batch.images.dtype == torch.float32
        assert batch.labels.dtype == batch.domains.dtype == torch.int64
        assert batch.domains.tolist() == [0, 1, 3] * 4
        assert (batch.first_slot, batch.substituted) == (0, 0)
        for slot, key in enumerate(stream.keys(step)):
            domain, _, rank = key.rpartition("-")
            sample = index.read(index.domain_number(domain), int(rank))
            assert sample.label == batch.labels[slot]
            from shards.transforms import decode_image

            assert torch.equal(decode_image(sample.image).float(), batch.images[slot])


def test_any_world_size_gives_the_same_batches_and_pixels(index: ShardIndex) -> None:
    stream = stream_of(index)
    alone = collect(stream, 3, 7)
    for world in (2, 3, 4, 6, 12):
        assert_equal(collect(stream, 3, 7, world), alone)
    assert_equal(collect(stream, 3, 7, 2, accumulation=3), alone)
    assert_equal(collect(stream, 3, 7, 1, accumulation=12), alone)
    assert_equal(collect(stream, 3, 7, 2, workers=2, accumulation=2), alone)


def test_resume_is_a_later_start(index: ShardIndex) -> None:
    whole = collect(stream_of(index), 0, 12)
    assert_equal(collect(stream_of(index), 7, 12), whole[7:])
    assert_equal(collect(stream_of(index), 7, 7), [])


@pytest.mark.parametrize("mode", ["permutation", "replacement"])
def test_worker_count_changes_nothing(index: ShardIndex, mode: str) -> None:
    stream = stream_of(index, mode=mode)
    alone = collect(stream, 0, 5)
    for workers in (1, 2):
        assert_equal(collect(stream, 0, 5, workers=workers), alone)


def test_thread_count_changes_nothing(tmp_path: Path) -> None:
    """Sums over large images are cut by thread; contrast jitter rounds what they give."""
    root = make_folder(tmp_path / "images", domains=("a",), classes=("x",), per_class=4)
    for number, path in enumerate(sorted(root.rglob("im*"))):
        path.write_bytes(image_bytes(number, "PNG", (500, 400)))
    index = write_shards(root, tmp_path / "out", FOLDER)
    from shards_fixtures import DATA_CONFIG

    from shards.transforms import train_transform

    transform = train_transform({**DATA_CONFIG, "input_size": (3, 384, 384)}, "domainbed")
    stream = stream_of(index, sources=[0], transform=transform)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(collect(stream, 0, 2))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


@pytest.mark.parametrize("workers", [0, 1])
def test_random_state_of_the_model_is_left_alone(index: ShardIndex, workers: int) -> None:
    torch.manual_seed(77)
    random.seed(77)
    expected = (torch.rand(3), random.random())
    torch.manual_seed(77)
    random.seed(77)
    iterator = iter(stream_of(index).loader(0, 3, workers=workers))
    next(iterator)
    next(iterator)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    del iterator


def test_same_sample_is_augmented_anew_each_epoch(index: ShardIndex) -> None:
    stream = stream_of(index, sources=[0], batch_per_domain=1)
    length = stream.num_train(0)
    first = {stream.keys(step)[0]: step for step in range(length)}
    second = {stream.keys(step)[0]: step for step in range(length, 2 * length)}
    key = stream.keys(0)[0]
    (one,), (other,) = collect(stream, 0, 1), collect(stream, second[key], second[key] + 1)
    assert first[key] == 0
    assert not torch.equal(one[0], other[0])


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
        DataConfigError, match="2 micro-batches .* 3 images per rank .* legal: 1, 3"
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
        ({"mode": "shuffle"}, "data.mode = 'shuffle': must be one of permutation, replacement"),
        ({"holdout_fraction": 1.0}, "holdout_fraction = 1.0"),
    ],
)
def test_bad_arguments_are_refused(index: ShardIndex, change: dict, match: str) -> None:
    with pytest.raises(DataConfigError, match=match):
        stream_of(index, **change)


def test_bad_loader_arguments_are_refused(index: ShardIndex) -> None:
    with pytest.raises(DataConfigError, match=r"data.workers = -1"):
        stream_of(index).loader(0, 1, workers=-1)
    with pytest.raises(DataConfigError, match="steps 3 to 2"):
        stream_of(index).loader(3, 2)


@pytest.fixture
def partly_broken(tmp_path: Path) -> tuple[ShardIndex, ShardIndex, set[str]]:
    """The same images twice, the second time with some that cannot be decoded."""
    root = make_folder(tmp_path / "images", domains=("art", "photo"), per_class=20)
    good = write_shards(root, tmp_path / "good", FOLDER)
    broken = set()
    for env, domain in enumerate(good.domains):
        files = sorted(path for path in (root / domain).rglob("im*"))
        for rank in (3, 8, 21, 33):
            files[rank].write_bytes(b"<html>" if rank % 2 else files[rank].read_bytes()[:100])
            broken.add(good.key(env, rank))
    return good, write_shards(root, tmp_path / "bad", FOLDER), broken


def test_undecodable_images_are_replaced_one_by_one(
    partly_broken: tuple[ShardIndex, ShardIndex, set[str]], caplog: pytest.LogCaptureFixture
) -> None:
    good, bad, broken = partly_broken
    healthy = stream_of(good, sources=[0, 1])
    stream = stream_of(bad, sources=[0, 1])
    expected_total = 0
    for step, (whole, other) in enumerate(
        zip(collect(healthy, 0, 20), stream.loader(0, 20), strict=True)
    ):
        keys = stream.keys(step)
        assert keys == healthy.keys(step)
        hit = [slot for slot, key in enumerate(keys) if key in broken]
        assert other.substituted == len(hit)
        expected_total += len(hit)
        for slot in range(8):
            same = torch.equal(other.images[slot], whole[0][slot])
            assert same == (slot not in hit)
        for slot in hit:
            env, position = slot % 2, step * 4 + slot // 2
            name = bad.domains[env]
            inside, _ = split_indices(bad.num_samples(env), 1, env)
            for attempt in range(1, 10):
                rank = int(inside[substitute_index(5, name, len(inside), position, attempt)])
                if bad.key(env, rank) not in broken:
                    break
            assert other.labels[slot] == bad.labels(env)[rank]
    assert expected_total > 5
    assert caplog.text.count("replaced by another of its domain") >= expected_total
    assert all(
        f"sample {key}: not a readable image" in caplog.text for key in broken & seen(stream)
    )
    assert_equal(collect(stream, 0, 20, 4, workers=1), collect(stream, 0, 20))


def seen(stream: DomainStream) -> set[str]:
    return {key for step in range(20) for key in stream.keys(step)}


def test_gives_up_when_nothing_can_be_decoded(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", domains=("art",))
    for path in root.rglob("im*"):
        path.write_bytes(b"nothing")
    index = write_shards(root, tmp_path / "out", FOLDER)
    with pytest.raises(DamagedDataError, match="domain 'art': 16 images in a row cannot be decode"):
        list(stream_of(index, sources=[0]).loader(0, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_bytes_stop_the_run_with_a_plain_error(tmp_path: Path, workers: int) -> None:
    index = make_set(tmp_path)
    for shard in index.shards:
        damage(index.root / shard.file, 1100)
    for env in range(3):
        for row in index.table(env):
            damage(index.root / index.shards[int(row["shard"])].file, int(row["offset"]) + 30)
    stream = stream_of(index, sources=[0, 1])
    with pytest.raises(DamagedDataError) as caught:
        list(stream.loader(0, 2, workers=workers))
    assert "is damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_storage_errors_stop_the_run(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(OSError, match="Input/output error"):
        list(stream_of(index).loader(0, 1))


def test_golden_digest_of_a_run(index: ShardIndex) -> None:
    """Order, split, slots and keys together; does not depend on any image's bytes."""
    stream = stream_of(index)
    assert [stream.batch_digest(step) for step in (0, 1, 1000)] == GOLDEN
    assert np.unique([stream.batch_digest(step) for step in range(50)]).size == 50
