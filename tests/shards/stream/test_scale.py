"""A large set without its images: the index is mapped, not copied, and the order stays exact.

Run as a program, it reports times and memory for any size, for example 10,000,000 samples.
"""

import hashlib
import json
import os
import pickle
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from shards.randomness import permutation
from shards.read.index import ShardIndex
from shards.read.layout import (
    FORMAT_VERSION,
    INDEX_NAME,
    TABLE_DTYPE,
    DomainInfo,
    ShardInfo,
    file_sha256,
)
from shards.stream.split import split_indices
from shards.stream.stream import DomainStream
from tests.support.shards_fixtures import pixels_only

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
SHARE = (8, 9, 12, 29, 30, 12)  # per cent, as in DomainNet
PER_SHARD = 1000


def make_large(folder: Path, samples: int) -> ShardIndex:
    """An index of that many samples, with files full of holes for shards."""
    shards: list[ShardInfo] = []
    infos = []
    for name, share in zip(DOMAINS, SHARE, strict=True):
        num = samples * share // 100
        table = np.zeros(num, dtype=TABLE_DTYPE)
        table["rank"] = np.arange(num)
        place = np.empty(num, dtype=np.int64)
        place[permutation(len(shards), num)] = np.arange(num)
        table["shard"] = len(shards) + place // PER_SHARD
        table["offset"] = 512 + place % PER_SHARD * 65536
        table["size"], table["label"] = 60_000, place % 345
        np.save(folder / f"{name}.npy", table)
        infos.append(
            DomainInfo(
                name=name,
                key_prefix=name,
                table=f"{name}.npy",
                samples=num,
                sha256=file_sha256(folder / f"{name}.npy"),
            )
        )
        for number in range(-(-num // PER_SHARD)):
            file = f"large-{name}-{number:06d}.tar"
            size = (PER_SHARD + 1) * 65536
            (folder / file).touch()
            os.truncate(folder / file, size)  # takes no space
            shards.append(ShardInfo(file=file, samples=PER_SHARD, bytes=size, sha256="0" * 64))
    content = {
        "format_version": FORMAT_VERSION,
        "dataset": "large",
        "classes": [f"class{number:03d}" for number in range(345)],
        "domains": [asdict(info) for info in infos],
        "shards": [asdict(shard) for shard in shards],
    }
    (folder / INDEX_NAME).write_text(json.dumps(content))
    return ShardIndex.load(folder)


def stream_of(index: ShardIndex, mode: str = "permutation") -> DomainStream:
    return DomainStream(
        index, sources=range(5), batch_per_domain=32, seed=0, trial_seed=0, transform=pixels_only,
        mode=mode, window=4 if mode == "window" else 0,  # type: ignore[arg-type]
    )  # fmt: skip


def order_digest(stream: DomainStream, steps: range) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for step in steps:
        digest.update(stream.batch_digest(step).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return make_large(tmp_path_factory.mktemp("large"), 200_000)


def test_tables_are_mapped_in_every_process(large: ShardIndex) -> None:
    copy = pickle.loads(pickle.dumps(large))
    for env in range(6):
        for index in (large, copy):
            assert isinstance(index.table(env).base, np.memmap)
            assert not index.table(env).flags.writeable
    assert len(pickle.dumps(large)) < 200_000 * TABLE_DTYPE.itemsize / 20
    assert len(json.dumps(stream_of(large).fingerprint())) < 500


@pytest.mark.parametrize("mode", ["permutation", "window"])
def test_epochs_of_a_large_domain_hold_every_sample_once(large: ShardIndex, mode: str) -> None:
    stream = stream_of(large, mode)
    inside, _ = split_indices(large.num_samples(1), 0, 1)
    for first in (0, 3 * len(inside), 10**6 * len(inside)):
        elements = stream._orders[1].elements(np.arange(first, first + len(inside)))
        assert np.array_equal(np.sort(elements), np.arange(len(inside)))
    steps = [0, 7, len(inside) // 32 + 1, 10**6]
    for step in steps:
        _, _, ranks = stream.slots(step)
        found = stream._orders[1].elements(np.arange(step * 32, step * 32 + 32))
        assert ranks[1::5].tolist() == inside[found].tolist()


def test_windows_need_few_shards(large: ShardIndex) -> None:
    stream = stream_of(large, "window")
    for step in (0, 100, 5000):
        live, _ = stream.windows(step)
        assert len(live) <= 2 * 4 * 5
        envs, _, ranks = stream.slots(step)
        read = {int(large.table(int(e))["shard"][r]) for e, r in zip(envs, ranks, strict=True)}
        assert read <= set(live)


def test_any_order_of_asking_gives_the_same(large: ShardIndex) -> None:
    forwards = [stream_of(large).batch_digest(step) for step in (0, 500, 10**6)]
    stream = stream_of(large)
    assert [stream.batch_digest(step) for step in (10**6, 500, 0)] == forwards[::-1]
    assert order_digest(stream_of(large), range(40)) == order_digest(stream, range(40))


def report(samples: int) -> None:
    """Print what a set of that size costs."""

    def said(what: str, started: float) -> None:
        sys.stdout.write(f"{what}: {time.process_time() - started:.2f} CPU-s\n")

    def memory(kind: str) -> float:
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if kind in x]
        return int(line.split()[1]) / 1024

    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        make_large(Path(folder), samples)
        said("index made", started)
        before = memory("RssAnon")
        started = time.process_time()
        index = ShardIndex.load(folder)
        said("index loaded", started)
        started = time.process_time()
        stream = stream_of(index)
        said("stream made", started)
        for mode in ("permutation", "window", "replacement"):
            stream = stream_of(index, mode)
            started = time.process_time()
            order_digest(stream, range(1000))
            said(f"{mode}: order digest of 1,000 steps", started)
        for mode in ("permutation", "window"):
            for step in (10, 10_000, 1_000_000):
                stream = stream_of(index, mode)
                started = time.process_time()
                stream.slots(step)
                said(f"{mode}: resumed at step {step:,}", started)
        del stream
        stream = stream_of(index)
        stream.slots(0)
        sys.stdout.write(
            f"memory of a worker: {memory('RssAnon') - before:.0f} MiB of its own, tables "
            f"{sum(index.table(env).nbytes for env in range(6)) / 2**20:.0f} MiB shared; "
            f"sent to a spawned worker: {len(pickle.dumps(stream)) / 2**20:.0f} MiB\n"
        )


if __name__ == "__main__":
    report(int(sys.argv[1]))
