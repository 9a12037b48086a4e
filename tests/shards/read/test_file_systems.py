"""Shard sets in file systems of fsspec: one in memory, one with an event loop as s3fs has it."""

import asyncio
import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import ClassVar

import fsspec.asyn
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractBufferedFile

from shards.config import DataConfig
from shards.errors import DamagedDataError, DataConfigError, StorageError
from shards.read.download import check_remote
from shards.read.index import ShardIndex
from tests.support.shards_fixtures import assert_equal, collect, make_set, stream_of
from tests.support.shards_server import remote_config

SHARD = "folder-art-000001.tar"


class CloudFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path, start, end)


class Cloud(AsyncFileSystem):
    """A folder behind an event loop in a thread of its own; it misbehaves as it is told.

    `faults`: file name -> what its next reads meet: an error, or seconds of silence.
    """

    protocol = "cloud"
    folder = Path()
    faults: ClassVar[defaultdict[str, list[Exception | float]]] = defaultdict(list)
    requests: ClassVar[Counter[str]] = Counter()

    async def _info(self, path: str, **_: object) -> dict[str, object]:
        size = (self.folder / os.path.basename(path)).stat().st_size
        return {"name": path, "size": size, "type": "file"}

    async def _cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: object
    ) -> bytes:
        name = os.path.basename(path)
        self.requests[name] += 1
        await asyncio.sleep(0.001)
        if self.faults[name]:
            fault = self.faults[name].pop(0)
            if isinstance(fault, Exception):
                raise fault
            await asyncio.sleep(fault)
        return (self.folder / name).read_bytes()[start:end]

    def _open(self, path: str, mode: str = "rb", **options: object) -> CloudFile:
        return CloudFile(self, path, mode, **options)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("file_systems")
    return make_set(folder, shard_size=4, domains=("art", "cartoon", "photo", "sketch"))


@pytest.fixture
def cloud(local: ShardIndex) -> type[Cloud]:
    fsspec.register_implementation("cloud", Cloud, clobber=True)
    Cloud.folder = local.root
    Cloud.faults.clear()
    Cloud.requests.clear()
    return Cloud


def test_a_set_in_memory_is_the_local_set(local: ShardIndex, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{local.root}/", "/sets/one", recursive=True)
    try:
        index = ShardIndex.load("memory://sets/one/", remote_config(tmp_path))
        assert index.sha256 == local.sha256
        assert_equal(collect(stream_of(index), 0, 4), collect(stream_of(local), 0, 4))
    finally:
        memory.rm("/sets", recursive=True)


def test_forked_loaders_have_an_event_loop_of_their_own(
    local: ShardIndex, cloud: type[Cloud], tmp_path: Path
) -> None:
    """The index is read by the parent, so its event loop runs before the loaders are forked."""
    expected = collect(stream_of(local, mode="window", window=1), 0, 6)
    for cache in (tmp_path / "first", tmp_path / "second"):
        index = ShardIndex.load("cloud://bucket/set", remote_config(cache))
        assert fsspec.asyn.iothread[0].is_alive()
        stream = stream_of(index, mode="window", window=1)
        found = collect(stream, 0, 6, workers=2, start_method="fork")
        assert_equal(found, expected)
        assert_equal(collect(stream, 0, 6), expected)
    assert not any(name.endswith(".tar") for name in cloud.requests), "loaders fetched them all"


def test_passing_faults_cost_nothing_but_time(
    local: ShardIndex, cloud: type[Cloud], tmp_path: Path
) -> None:
    cloud.faults[SHARD] = [ConnectionError("reset"), RuntimeError("throttled"), 30.0]
    cloud.faults["index.json"] = [KeyError("odd")]
    index = ShardIndex.load("cloud://b/set", remote_config(tmp_path, deadline=2.0))
    assert_equal(collect(stream_of(index), 0, 9), collect(stream_of(local), 0, 9))
    assert cloud.requests[SHARD] == 4


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (FileNotFoundError("no such key"), r"FileNotFoundError: no such key\) in 1 attempt "),
        (PermissionError("denied"), r"PermissionError: denied\) in 1 attempt "),
        (RuntimeError("at https://u:secret@h?sig=secret"), r"at https://h\?\.\.\.\) in 2 attempts"),
    ],
)
def test_lasting_faults_end_the_run(
    cloud: type[Cloud], tmp_path: Path, fault: Exception, match: str
) -> None:
    cloud.faults["index.json"] = [fault] * 9
    with pytest.raises(StorageError, match=match) as caught:
        ShardIndex.load("cloud://b/set", remote_config(tmp_path, retries=1))
    assert "secret" not in str(caught.value)


def test_silence_ends_within_the_deadline(cloud: type[Cloud], tmp_path: Path) -> None:
    cloud.faults["index.json"] = [60.0] * 9
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"nothing came for 0\.2 s\) in 2 attempts within 0\.4"):
        ShardIndex.load("cloud://b/set", remote_config(tmp_path, deadline=0.4, retries=1))
    assert time.monotonic() - started < 20


def test_a_file_of_another_length_is_found(
    local: ShardIndex, cloud: type[Cloud], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ShardIndex.load("cloud://b/set", remote_config(tmp_path / "cache", retries=1))
    (tmp_path / SHARD).write_bytes((local.root / SHARD).read_bytes()[:700])
    monkeypatch.setattr(cloud, "folder", tmp_path)
    shard = [info.file for info in index.shards].index(SHARD)
    with pytest.raises(DamagedDataError, match=r"bytes 700, the index promises \d+ \(2 attempts\)"):
        index.reader.read(shard, 0, 1)
    (tmp_path / SHARD).write_bytes(bytes(10**6))
    with pytest.raises(DamagedDataError, match=r"gives more than \d+ bytes \(2 attempts\)"):
        index.reader.read(shard, 0, 1)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named_by_its_extra(
    monkeypatch: pytest.MonkeyPatch, scheme: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataConfigError) as caught:
        check_remote(f"{scheme}://user:secret@bucket/set")
    assert str(caught.value) == (
        f"data.root = '{scheme}://bucket/set': the package for {scheme}:// is not installed; "
        f"pip install 'moa-trainer[{scheme}]'"
    )


def test_the_hub_needs_no_extra() -> None:
    check_remote("hf://datasets/user/set@main/folder")
    config = DataConfig(root="hf://datasets/user/set", cache_dir="cache")
    assert config.problems() == config.unused() == []
