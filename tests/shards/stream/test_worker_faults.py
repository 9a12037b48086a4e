"""Loader processes without room in shared memory, and with an end from outside."""

import errno
import os
import resource
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from shards.errors import DataConfigError, LoaderKilledError
from shards.read.index import ShardIndex
from shards.stream import worker_faults
from shards.stream.worker_faults import check_shared_memory, told
from tests.support.shards_fixtures import make_set, stream_of
from trainer.config.command_line import parse
from trainer.prepare.batches import check_prefetching
from trainer.process.world import World

MIB = 2**20


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("faults")
    return make_set(folder, domains=("art", "cartoon", "photo", "sketch"))


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's shared memory, of which 4 MiB are taken."""
    status = SimpleNamespace(f_frsize=4096, f_blocks=64 * MIB // 4096, f_bavail=60 * MIB // 4096)
    monkeypatch.setattr(os, "statvfs", lambda _: status)


@pytest.mark.usefixtures("container")
def test_what_is_prefetched_must_fit() -> None:
    check_shared_memory(10 * MIB, workers=2, processes=1)  # 2 x 2 made ahead, 2 in hand
    check_shared_memory(10 * MIB, workers=0, processes=8)
    for batch, workers, processes in ((10 * MIB + 1, 2, 1), (10 * MIB, 3, 1), (10 * MIB, 2, 2)):
        with pytest.raises(DataConfigError) as caught:
            check_shared_memory(batch, workers, processes)
        told = str(caught.value)
        needed = batch * (2 * workers + 2) * processes / MIB
        assert told.startswith(
            f"data.workers = {workers}: /dev/shm, of 64 MiB with 60 MiB free, must hold "
            f"{needed:.3g} MiB of batches in flight; "
        )
        assert "--shm-size" in told
    for workers in (1, 0):  # the remedy is true
        check_shared_memory(15 * MIB, workers, processes=1)


@pytest.mark.usefixtures("container")
def test_a_run_is_checked_before_it_begins() -> None:
    """224 px: 147 KiB an image, 32 x 5 of a step on two ranks, and 16 of an evaluation."""
    size = {"input_size": (3, 224, 224)}
    flags = ["--train.batch_per_domain=32", "--train.eval_batch=16", "--data.workers"]
    check_prefetching(parse([*flags, "0"]), World(0, 2, 0, 2), 160, size)
    check_prefetching(parse([*flags, "1"]), World(0, 2, 0, 1), 160, size)
    with pytest.raises(DataConfigError, match=r"must hold 110 MiB of batches"):
        check_prefetching(parse([*flags, "1"]), World(0, 2, 0, 2), 160, size)
    with pytest.raises(DataConfigError, match=r"must hold 127 MiB of batches"):  # and 3 x 5 beside
        check_prefetching(parse([*flags, "1", "--data.mix=mixup"]), World(0, 2, 0, 2), 160, size)


def limited(_: int) -> None:
    """In a loader process: from now on shared memory refuses more than a batch takes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def test_a_batch_without_room_is_an_error_and_no_wait(index: ShardIndex) -> None:
    loader = stream_of(index).loader(0, 9, workers=2)
    loader.worker_init_fn = limited
    with pytest.raises(
        DataConfigError, match=r"data\.workers = 2: /dev/shm, .*has no room for a batch of 0\.\d+ M"
    ):
        list(loader)


def test_no_room_for_the_loaders_own_queues() -> None:
    def full() -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataConfigError, match=r"data\.workers = 3: /dev/shm, .* free, is full"):
        list(told(full, 3))
    with pytest.raises(OSError, match="No space left"):
        list(told(full, 0))


class Broken:
    """A loader of torch whose process ends so while a batch is on its way."""

    def __init__(self, error: Exception, exitcode: int | None) -> None:
        reading, self.writing = os.pipe()
        self.error, ended = error, exitcode is not None
        self._workers = [SimpleNamespace(pid=7, sentinel=reading, exitcode=exitcode)]
        if ended:
            os.close(self.writing)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> NoReturn:
        raise self.error


@pytest.mark.parametrize(
    "error", [RuntimeError("DataLoader worker"), ConnectionError(), EOFError()]
)
@pytest.mark.parametrize(
    ("code", "how"), [(-9, "killed by SIGKILL"), (-7, "killed by SIGBUS"), (3, "ended with 3")]
)
def test_how_a_loader_process_ended_is_told(error: Exception, code: int, how: str) -> None:
    with pytest.raises(LoaderKilledError, match=rf"loader process 7 was {how}; a machine"):
        list(told(lambda: Broken(error, code), 1))


def test_other_errors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_faults.connection, "wait", lambda *_, **__: [])  # without a pause
    with pytest.raises(RuntimeError, match="Too many open files"):
        list(told(lambda: Broken(RuntimeError("Too many open files"), None), 1))
