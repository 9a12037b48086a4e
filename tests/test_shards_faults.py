import os
from pathlib import Path

import pytest
import torch
from shards_fixtures import (
    FOLDER,
    assert_equal,
    collect,
    damage,
    make_folder,
    make_set,
    stream_of,
)

from shards.errors import DamagedDataError
from shards.index import ShardIndex
from shards.order import substitute_index
from shards.split import split_indices
from shards.stream import DomainStream
from shards.writer import write_shards


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("stream")
    return make_set(folder, domains=("art", "cartoon", "photo", "sketch"))


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
