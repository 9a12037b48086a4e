"""Damaged images and failing disks: replaced and counted, or the end of the run, never silent."""

import json
import logging
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from shards.errors import DamagedDataError, DataConfigError, OutputError, StorageError
from shards.pixels.decoding import Decoder
from shards.read.index import ShardIndex
from shards.stream.bad_samples import (
    BadSample,
    check_bad_fraction,
    count_bad,
    counts_from_names,
    named_counts,
)
from shards.stream.order import substitute_index
from shards.stream.split import split_indices
from shards.writer import write_shards
from tests.support.shards_fixtures import (
    FOLDER,
    assert_equal,
    collect,
    damage,
    make_folder,
    make_set,
    stream_of,
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("stream")
    return make_set(folder, domains=("art", "cartoon", "photo", "sketch"))


Broken = tuple[ShardIndex, ShardIndex, dict[str, str]]


@pytest.fixture(scope="module")
def partly_broken(tmp_path_factory: pytest.TempPathFactory) -> Broken:
    """The same images twice, the second time some of them broken; and how each is broken."""
    folder = tmp_path_factory.mktemp("broken")
    root = make_folder(folder / "images", domains=("art", "photo"), per_class=20)
    good = write_shards(root, folder / "good", FOLDER)
    broken = {}
    for env, domain in enumerate(good.domains):
        files = sorted((root / domain).rglob("im*"))
        whole = files[33].read_bytes()
        for rank, content, reason in (
            (3, b"<html>", "undecodable"),
            (8, b"", "undecodable"),
            (21, bytes(len(whole)), "undecodable"),
            (33, whole[: len(whole) - 120], "truncated"),
        ):
            files[rank].write_bytes(content)
            broken[good.key(env, rank)] = reason
    bad = write_shards(root, folder / "bad", FOLDER)
    for env, rank in ((0, 14), (1, 30)):
        row = bad.table(env)[rank]
        damage(bad.root / bad.shards[int(row["shard"])].file, int(row["offset"]) + 20)
        broken[bad.key(env, rank)] = "crc32"
    return good, bad, broken


def test_bad_images_are_replaced_one_by_one_and_counted(
    partly_broken: Broken, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad, broken = partly_broken
    bad.reported.clear()  # each is told once, in whichever test
    healthy = stream_of(good, sources=[0, 1])
    stream = stream_of(bad, sources=[0, 1], decoder=Decoder(truncated="substitute"))
    counts = torch.zeros(2, 3, dtype=torch.int64)
    expected: Counter[str] = Counter()
    seen = set()
    for step, (whole, other) in enumerate(
        zip(collect(healthy, 0, 20), stream.loader(0, 20), strict=True)
    ):
        keys = stream.keys(step)
        assert keys == healthy.keys(step)
        seen.update(keys)
        hit = [slot for slot, key in enumerate(keys) if key in broken]
        assert other.substituted == len(hit)
        assert [s.key for s in other.bad if not s.attempt] == [keys[slot] for slot in hit]
        counts += count_bad(other.bad, 2)
        for slot in range(8):
            same = torch.equal(other.images[slot], whole[0][slot])
            assert same == (slot not in hit)
        for slot in hit:
            env, position = slot % 2, step * 4 + slot // 2
            name = bad.domains[env]
            reason = broken[keys[slot]].replace("truncated", "undecodable")
            expected[f"{name}/{reason}"] += 1
            inside, _ = split_indices(bad.num_samples(env), 1, env)
            for attempt in range(1, 10):
                rank = int(inside[substitute_index(5, name, len(inside), position, attempt)])
                if bad.key(env, rank) not in broken:
                    break
            assert other.labels[slot] == bad.labels(env)[rank]
    assert named_counts(counts, bad.domains) == dict(expected)
    assert sum(expected.values()) > 10
    assert any(name.endswith("crc32") for name in expected)
    for key in set(broken) & seen:
        assert caplog.text.count(f"sample {key} (folder-") == 1, "each is told once"
    assert_equal(collect(stream, 0, 20, 4, workers=1), collect(stream, 0, 20))


def test_incomplete_images_are_used_and_counted(partly_broken: Broken) -> None:
    good, bad, broken = partly_broken
    stream, healthy = stream_of(bad, sources=[0, 1]), stream_of(good, sources=[0, 1])
    kept = 0
    whole_batches = collect(healthy, 0, 20)
    for step, batch in enumerate(stream.loader(0, 20, workers=1)):
        keys = stream.keys(step)
        kept += sum(broken.get(key) == "truncated" for key in keys)
        assert batch.substituted == sum(broken.get(key) not in (None, "truncated") for key in keys)
        for slot, key in enumerate(keys):
            if broken.get(key) == "truncated":
                assert batch.labels[slot] == whole_batches[step][1][slot]
                assert not torch.equal(batch.images[slot], whole_batches[step][0][slot])
        found = named_counts(count_bad(batch.bad, 2), bad.domains)
        kept -= sum(count for name, count in found.items() if name.endswith("truncated"))
    assert kept == 0
    assert any(broken.get(key) == "truncated" for step in range(20) for key in stream.keys(step))


def test_counts_do_not_depend_on_the_world(partly_broken: Broken) -> None:
    _, bad, _ = partly_broken
    stream = stream_of(bad, sources=[0, 1])
    totals = []
    for world, workers in ((1, 0), (2, 1), (4, 0), (8, 2)):
        counts = torch.zeros(2, 3, dtype=torch.int64)
        for rank in range(world):
            for batch in stream.loader(0, 12, rank, world, workers=workers):
                counts += count_bad(batch.bad, 2)
        totals.append(named_counts(counts, bad.domains))
    assert totals == totals[:1] * 4
    assert sum(totals[0].values()) > 5
    restored = counts_from_names(json.loads(json.dumps(totals[0])), bad.domains)
    assert torch.equal(restored, counts)


def bad(env: int, reason: str = "crc32", attempt: int = 0) -> BadSample:
    return BadSample(env, "key", "shard", 0, reason, "", attempt)


def test_only_slots_are_counted() -> None:
    counts = count_bad([bad(0), bad(0, attempt=1), bad(1, "truncated"), bad(1)], 3)
    assert counts.tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0]]
    assert named_counts(counts, ["a", "b", "c"]) == {
        "a/crc32": 1, "b/crc32": 1, "b/truncated": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("replaced", "drawn", "size", "limit", "ends"),
    [
        (10, 100, 1000, 0.001, False),  # ten an epoch are no reason to stop
        (11, 100, 1000, 0.001, True),
        (20, 150, 100, 0.001, False),  # in the second epoch
        (21, 150, 100, 0.001, True),
        (100, 100_000, 200_000, 0.001, False),
        (101, 100_000, 200_000, 0.001, True),
        (0, 100, 100, 0.0, False),
        (1, 100, 100, 0.0, True),  # 0 means none at all
        (100, 100, 100, 1.0, False),
    ],
)
def test_limit_of_bad_images(
    replaced: int, drawn: int, size: int, limit: float, ends: bool
) -> None:
    counts = torch.tensor([[0, 0, 500], [replaced - replaced // 2, replaced // 2, 500]])
    seen, sizes = {0: drawn, 1: drawn}, {0: size, 1: size}
    if not ends:
        check_bad_fraction(counts, seen, sizes, ["a", "b"], limit)
        return
    with pytest.raises(
        DamagedDataError,
        match=rf"domain 'b': {replaced} of {drawn} images had to be replaced \(.*b/crc32.*\), more "
        rf"than data.max_bad_fraction = {limit} allows; .*--out SET --verify --deep`",
    ):
        check_bad_fraction(counts, seen, sizes, ["a", "b"], limit)


def test_gives_up_when_nothing_can_be_decoded(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", domains=("art",))
    for path in root.rglob("im*"):
        path.write_bytes(b"nothing")
    index = write_shards(root, tmp_path / "out", FOLDER)
    with pytest.raises(DamagedDataError) as caught:
        list(stream_of(index, sources=[0]).loader(0, 1))
    assert "domain 'art': 17 images in a row cannot be used" in str(caught.value)
    assert f"`python -m shards.writer --out {index.root} --verify --deep`" in str(caught.value)
    index.remote = True  # then its root is but a cache, and verified where it is stored
    with pytest.raises(DamagedDataError, match="--out SET --verify --deep"):
        list(stream_of(index, sources=[0]).loader(0, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_ends_early_stops_the_run_with_a_plain_error(
    index: ShardIndex, tmp_path: Path, workers: int
) -> None:
    index = make_set(tmp_path)
    for shard in index.shards:
        os.truncate(index.root / shard.file, 1000)
    with pytest.raises(DamagedDataError) as caught:
        list(stream_of(index, sources=[0, 1]).loader(0, 2, workers=workers))
    assert "is damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_domain_of_three_images(tmp_path: Path) -> None:
    """Fault 18: far fewer images than its share of the batch; it repeats, nothing hangs."""
    root = make_folder(tmp_path / "images", domains=("art", "photo"), per_class=20)
    for path in sorted((root / "photo").rglob("im*"))[4:]:
        path.unlink()
    (root / "photo" / "dog" / "one.png").write_bytes(
        (root / "photo" / "cat" / "im000.png").read_bytes()
    )
    index = write_shards(root, tmp_path / "out", FOLDER)
    stream = stream_of(index, sources=[0, 1], batch_per_domain=10)
    assert stream.num_train(1) == 4
    alone = collect(stream, 0, 3)
    for _, _, domains in alone:
        assert domains.tolist() == [0, 1] * 10
    tiny = [key for step in range(2) for key in stream.keys(step)[1::2]]
    assert set(Counter(tiny).values()) == {5}, "every image equally often"
    assert stream.epochs(2)["photo"] == 5
    assert_equal(collect(stream, 0, 3, 5, workers=1), alone)


class FlakyDisk:
    """Stands for `os.pread`; fails some times first."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls, self.real = failures, 0, os.pread

    def __call__(self, *arguments: int) -> bytes:
        self.calls += 1
        if self.calls <= self.failures:
            raise OSError(5, "Input/output error")
        return self.real(*arguments)


def test_storage_errors_are_retried(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = collect(stream_of(index), 0, 1)
    monkeypatch.setattr(index.reader, "retries", 2)
    monkeypatch.setattr("shards.read.retry.PAUSE", 0)
    disk = FlakyDisk(2)
    monkeypatch.setattr(os, "pread", disk)
    assert_equal(collect(stream_of(index), 0, 1), expected)
    assert disk.calls == 12 + 2


@pytest.mark.parametrize("workers", [0, 1])
def test_storage_that_keeps_failing_stops_the_run(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(index.reader, "retries", 2)
    monkeypatch.setattr("shards.read.retry.PAUSE", 0)
    disk = FlakyDisk(10**9)
    monkeypatch.setattr(os, "pread", disk)
    with pytest.raises(StorageError, match=r"\w-\d+\.tar: Input/output error after 3 attempts"):
        list(stream_of(index).loader(0, 1, workers=workers))
    assert workers or disk.calls == 3


@pytest.mark.parametrize("kind", [OutputError, DataConfigError])
def test_what_a_cache_refuses_arrives_as_it_was_raised(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def full(shard: int) -> int:
        raise kind("the cache is full")

    monkeypatch.setattr(index.reader, "_open", full)
    index.close()
    with pytest.raises(kind) as caught:
        list(stream_of(index).loader(0, 1, workers=1))
    assert str(caught.value) == "the cache is full"


def test_a_read_may_come_in_pieces(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = collect(stream_of(index), 0, 1)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: real(file, min(size, 100), offset))
    assert_equal(collect(stream_of(index), 0, 1), expected)


def test_bad_samples_are_told_where_the_log_is(
    partly_broken: Broken, caplog: pytest.LogCaptureFixture
) -> None:
    """A spawned loader process has no log of its own."""
    partly_broken[1].reported.clear()
    with caplog.at_level(logging.WARNING):
        list(stream_of(partly_broken[1], sources=[0, 1]).loader(
            0, 6, workers=1, start_method="spawn"
        ))  # fmt: skip
    assert any("replaced" in record.getMessage() for record in caplog.records)
    assert {record.process for record in caplog.records} == {os.getpid()}
