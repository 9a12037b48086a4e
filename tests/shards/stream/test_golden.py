"""The order of the data, pinned: digests in `tests/golden/data_order.json`.

Each digest covers 20 of 200 steps: of what the loader delivers slot by slot, either the place of
every sample, told by its stored bytes, or the crc of its augmented pixels. They must come out at
any world size, with any workers, started in any way, from a folder or a server, and after any
number of kills.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.config import DataConfig
from shards.pixels.decoding import Decoded
from shards.read.index import ShardIndex
from shards.stream.stream import DomainStream
from tests.support.shards_fixtures import make_set, small_train_transform
from tests.support.shards_server import Server

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "data_order.json").read_text())
STEPS, BLOCK = 200, 20
MODES = {"permutation": 0, "window": 2, "replacement": 0}


class Identity:
    """Stands for the decoder: the stored bytes themselves, as a number."""

    def __call__(self, data: bytes) -> Decoded:
        return Decoded(torch.tensor([zlib.crc32(data)]), False)


def unchanged(image: Any) -> Any:
    return image


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("golden")
    return make_set(folder, shard_size=5, domains=("art", "cartoon", "photo", "real", "sketch"))


@pytest.fixture(scope="module")
def remote(local: ShardIndex, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardIndex]:
    with pytest.MonkeyPatch.context() as patch, Server(local.root) as server:
        patch.setenv("no_proxy", "127.0.0.1")
        yield ShardIndex.load(
            server.url, DataConfig(cache_dir=str(tmp_path_factory.mktemp("cache")))
        )


def stream_of(index: ShardIndex, mode: str, pixels: bool) -> DomainStream:
    ways = {} if pixels else {"decoder": Identity()}
    return DomainStream(
        index,
        sources=[0, 1, 2, 4],
        batch_per_domain=5,
        seed=11,
        trial_seed=1,
        transform=small_train_transform() if pixels else unchanged,
        mode=mode,  # type: ignore[arg-type]
        window=MODES[mode],
        **ways,  # type: ignore[arg-type]
    )


def places(index: ShardIndex) -> dict[int, int]:
    """Number of a sample's domain and its rank, by the crc of its bytes."""
    return {
        int(row["crc32"]): 1000 * env + rank
        for env in range(len(index.domains))
        for rank, row in enumerate(index.table(env))
    }


def slots(batch: Any, known: dict[int, int]) -> list[int]:
    """One number per slot of a micro-batch."""
    if batch.images.dtype == torch.int64:
        return [known[crc] for crc in batch.images[:, 0].tolist()]
    return [zlib.crc32(image.numpy().tobytes()) for image in batch.images]


def digests(stream: DomainStream, world: int = 1, steps: int = STEPS, **options: Any) -> list[str]:
    """One digest per block of steps, of all ranks' slots in order."""
    known = places(stream.index)
    ranks = [
        [slots(batch, known) for batch in stream.loader(0, steps, rank, world, **options)]
        for rank in range(world)
    ]
    rows = [[slot for rank in ranks for slot in rank[step]] for step in range(steps)]
    return [digest(rows[first : first + BLOCK]) for first in range(0, steps, BLOCK)]


def digest(rows: list[list[int]]) -> str:
    return hashlib.blake2b(np.array(rows, dtype="<u4").tobytes(), digest_size=8).hexdigest()


def keys_digest(stream: DomainStream) -> str:
    text = "\n".join(key for step in range(STEPS) for key in stream.keys(step))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@pytest.mark.parametrize("mode", MODES)
def test_names_of_the_samples(local: ShardIndex, remote: ShardIndex, mode: str) -> None:
    assert keys_digest(stream_of(local, mode, False)) == GOLDEN["keys"][mode]
    assert keys_digest(stream_of(remote, mode, False)) == GOLDEN["keys"][mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("world", "workers"),
    # Other pairs: of a server, and for the pixels.
    [(1, 0), (2, 0), (4, 0), (5, 0), (1, 2), (4, 1)],
)
def test_samples(local: ShardIndex, mode: str, world: int, workers: int) -> None:
    found = digests(stream_of(local, mode, False), world, workers=workers)
    assert found == GOLDEN["samples"][mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (5, 1)])
def test_samples_of_a_server(remote: ShardIndex, mode: str, world: int, workers: int) -> None:
    found = digests(stream_of(remote, mode, False), world, workers=workers)
    assert found == GOLDEN["samples"][mode]


@pytest.mark.parametrize("mode", MODES)
def test_pixels(local: ShardIndex, mode: str) -> None:
    assert digests(stream_of(local, mode, True)) == GOLDEN["pixels"][mode]


@pytest.mark.parametrize(
    ("mode", "world", "workers", "place", "start"),
    [
        ("permutation", 4, 2, "local", "fork"),
        ("window", 5, 1, "remote", "fork"),
        ("replacement", 2, 2, "remote", "fork"),
        ("replacement", 1, 1, "remote", "spawn"),
    ],
)
def test_pixels_in_other_circumstances(
    request: pytest.FixtureRequest, mode: str, world: int, workers: int, place: str, start: str
) -> None:
    index = request.getfixturevalue(place)
    options: dict[str, Any] = {"workers": workers, "start_method": start, "steps": 60}
    found = digests(stream_of(index, mode, True), world, **options)
    assert found == GOLDEN["pixels"][mode][:3]


def train(stream: DomainStream, first: int, rank: int, world: int, pipe: int) -> None:
    """A rank's process: tells slot by slot what it got, until it is killed or done."""
    known = places(stream.index)
    for step, batch in enumerate(stream.loader(first, STEPS, rank, world), start=first):
        line = json.dumps([step, rank, slots(batch, known)]).encode() + b"\n"
        assert len(line) < 4096, "longer lines would mix in the pipe"
        os.write(pipe, line)


def run_until(
    stream: DomainStream, first: int, world: int, stop: int
) -> dict[int, dict[int, list[int]]]:
    """Start all ranks at a step; kill them all once one of them is past `stop`."""
    context = multiprocessing.get_context("fork")
    source, sink = os.pipe()
    ranks = [
        context.Process(target=train, args=(stream, first, rank, world, sink))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    os.close(sink)
    told: dict[int, dict[int, list[int]]] = {}
    with open(source) as lines:
        for line in lines:
            if not line.endswith("\n"):
                break  # cut short by the kill
            step, rank, row = json.loads(line)
            told.setdefault(step, {})[rank] = row
            if step >= stop:
                for process in ranks:
                    process.kill()
    for process in ranks:
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    return {step: rows for step, rows in told.items() if len(rows) == world}


@pytest.mark.parametrize("mode", MODES)
def test_kills_and_other_world_sizes_change_nothing(local: ShardIndex, mode: str) -> None:
    stream = stream_of(local, mode, False)
    random.seed(len(mode))
    rows: dict[int, list[int]] = {}
    first, kills = 0, 0
    for world in (2, 4, 1, 5, 2, 1):
        stop = STEPS if kills == 5 else first + random.randrange(5, 45)
        done = run_until(stream, first, world, stop)
        for step, by_rank in done.items():
            row = [slot for rank in sorted(by_rank) for slot in by_rank[rank]]
            assert rows.setdefault(step, row) == row, "a step done again is the same"
        kills += stop < STEPS
        first = min(max(done) + 1, STEPS) // 5 * 5 if done else first  # checkpoints every 5 steps
    assert kills == 5
    blocks = [digest([rows[s] for s in range(b, b + BLOCK)]) for b in range(0, STEPS, BLOCK)]
    assert blocks == GOLDEN["samples"][mode]


if __name__ == "__main__":  # prints what belongs into the golden file
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = make_set(
            Path(folder), shard_size=5, domains=("art", "cartoon", "photo", "real", "sketch")
        )
        content = {
            "keys": {m: keys_digest(stream_of(made, m, False)) for m in MODES},
            "samples": {m: digests(stream_of(made, m, False)) for m in MODES},
            "pixels": {m: digests(stream_of(made, m, True)) for m in MODES},
        }
    json.dump(content, sys.stdout, indent=1)
