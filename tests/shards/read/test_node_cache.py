"""One cache for many processes: room that comes later, and copies that another has replaced."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest

from shards.errors import DataConfigError, StorageError
from shards.read.index import ShardIndex
from shards.read.node_cache import NodeCache
from tests.support.shards_fixtures import damage, make_set
from tests.support.shards_server import Server, node_cache, remote_config


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return make_set(tmp_path_factory.mktemp("cache"), domains=("art", "photo"))


@pytest.fixture
def server(local: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(local.root) as server:
        yield server


def ten_bytes(path: Path) -> None:
    path.write_bytes(bytes(10))


def test_room_that_others_are_filling_is_waited_for(tmp_path: Path) -> None:
    """Eight at a time, and room for four and a half."""

    def slowly(path: Path) -> None:
        time.sleep(0.3)
        ten_bytes(path)

    def have(number: int) -> bool:
        return node_cache(tmp_path, 45).obtain(f"{number}.tar", 10, slowly)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(have, range(8))) == [True] * 8
    assert len(list(tmp_path.glob("*/*.tar"))) == 4


def test_a_cache_can_be_opened_by_many_at_the_same_time(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: NodeCache(tmp_path, "set", 45), range(2000)))
    assert list((tmp_path / "set").iterdir()) == []


def test_others_that_get_nowhere_end_the_wait(tmp_path: Path) -> None:
    cache = node_cache(tmp_path, 25, patience=0.3)
    assert cache.obtain("kept.tar", 10, ten_bytes)
    ten_bytes(cache.path("a.tar.partial"))
    ten_bytes(cache.path("b.tar.partial"))
    with filelock.FileLock(cache.path("a.tar.lock")), filelock.FileLock(cache.path("b.tar.lock")):
        assert not cache.obtain("c.tar", 10, ten_bytes, wait=False), "a prefetch does not wait"
        with pytest.raises(
            StorageError, match=r"no room for c\.tar, since .* fetching a\.tar, b\.tar for 0\.3 s; "
        ):
            cache.obtain("c.tar", 10, ten_bytes)
        assert cache.holds("kept.tar"), "nothing goes in vain"


def test_a_file_larger_than_the_cache_costs_nothing(tmp_path: Path) -> None:
    cache = node_cache(tmp_path, 25)
    assert cache.obtain("kept.tar", 10, ten_bytes)
    with pytest.raises(DataConfigError, match=r"data\.cache_gib = .* no room for a\.tar \(26 "):
        cache.obtain("a.tar", 26, ten_bytes)
    assert cache.holds("kept.tar")


def test_only_what_a_cache_wrote_is_counted_and_deleted(
    server: Server, local: ShardIndex, tmp_path: Path
) -> None:
    """In a folder with the user's own shards, and a cache of the same make beside them."""
    other = node_cache(tmp_path, 10**9)
    assert other.obtain("a.tar", 10, ten_bytes)
    theirs = [
        tmp_path / "mine/own.tar", tmp_path / "mine/own.tar.partial", tmp_path / "index/0.tar",
        tmp_path / ("0" * 32) / "a.tar", other.path("photos.tar"), tmp_path / "top.tar",
        tmp_path / "set/folder-art-000000.tar",
    ]  # fmt: skip
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(10**6))
    for folder in (tmp_path / "set", tmp_path / ("0" * 32)):  # a set of one's own, and one renamed
        (folder / "index.json").write_bytes((local.root / "index.json").read_bytes())
    largest = max(shard.bytes for shard in local.shards)
    index = ShardIndex.load(server.url, remote_config(tmp_path, largest))
    found = [index.read(env, place) for env in range(2) for place in range(18)]
    assert found == [local.read(env, place) for env in range(2) for place in range(18)]
    assert all(path.stat().st_size == 10**6 for path in theirs)
    assert not other.holds("a.tar"), "the caches share the bound"


def test_a_passing_file_goes_first_only_when_it_is_open(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ShardIndex.load(server.url, remote_config(tmp_path))
    assert index.reader.remote is not None
    cache = index.reader.remote.cache
    wanted = []

    def taken_by_another(files: list[str], passing: bool = False) -> None:
        if not wanted:
            cache.path(files[0]).unlink()
        wanted.append((files, passing))

    monkeypatch.setattr(cache, "touch", taken_by_another)
    index.read(0, 0)
    file = index.shards[int(index.table(0)[0]["shard"])].file
    assert wanted == [([file], True)]
    assert server.requests[file] == 1


def test_a_copy_that_another_process_replaced_stays(
    local: ShardIndex, server: Server, tmp_path: Path
) -> None:
    """Each holds the damaged file open; only the first to notice has it fetched again."""
    indexes = [ShardIndex.load(server.url, remote_config(tmp_path)) for _ in range(4)]
    shard = int(local.table(0)[0]["shard"])
    file = local.shards[shard].file
    for index in indexes:
        index.reader.read(shard, 0, 1)
    row = local.table(0)[0]
    damage(next(tmp_path.glob(f"*/{file}")), int(row["offset"]) + 20)
    for index in indexes:
        assert index.read(0, 0) == local.read(0, 0)
    assert server.requests[file] == 2


@pytest.mark.parametrize("name", ["index.json", "folder-art.npy"])
def test_what_a_loss_of_power_emptied_is_replaced(
    server: Server, tmp_path: Path, name: str
) -> None:
    expected = ShardIndex.load(server.url, remote_config(tmp_path)).sha256
    (copy,) = tmp_path.glob(f"*/{name}")
    os.truncate(copy, 0)
    assert ShardIndex.load(server.url, remote_config(tmp_path)).sha256 == expected
    assert copy.stat().st_size
