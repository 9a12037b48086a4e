"""Shard sets on a server or behind a command: the same data, through a bounded cache."""

import errno
import multiprocessing
import os
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
import trustme

from shards.config import DataConfig
from shards.errors import DamagedDataError, DataConfigError, OutputError, StorageError
from shards.read.download import file_url
from shards.read.index import ShardIndex
from shards.read.retry import fetch
from shards.write.verify import verify_shards
from tests.support.shards_fixtures import assert_equal, collect, damage, make_set, stream_of
from tests.support.shards_server import Server, node_cache, remote_config

SHARD = "folder-art-000001.tar"
WINDOW = {"mode": "window", "window": 1}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("remote")
    return make_set(folder, shard_size=4, domains=("art", "cartoon", "photo", "sketch"))


@pytest.fixture
def server(local: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(local.root) as server:
        yield server


def shards_of(index: ShardIndex, keys: list[str]) -> set[str]:
    """The shards that hold these samples."""
    files = set()
    for key in keys:
        domain, _, place = key.rpartition("-")
        row = index.table(index.domain_number(domain))[int(place)]
        files.add(index.shards[int(row["shard"])].file)
    return files


@pytest.mark.parametrize("kind", ["http", "pipe", "file"])
def test_remote_data_is_the_local_data(
    local: ShardIndex, server: Server, tmp_path: Path, kind: str
) -> None:
    root = {
        "http": server.url + "/?token=a%20b",
        "pipe": f"pipe:cat {local.root}/{{}} | cat",
        "file": local.root.as_uri(),
    }[kind]
    index = ShardIndex.load(root, remote_config(tmp_path))
    assert index.sha256 == local.sha256
    assert index.reader.remote is not None
    assert index.reader.remote.cache.limit == 10**9
    assert_equal(collect(stream_of(index), 0, 4), collect(stream_of(local), 0, 4))
    assert stream_of(index).fingerprint() == stream_of(local).fingerprint()


@pytest.mark.parametrize("workers", [0, 2])
def test_each_shard_is_fetched_once(
    local: ShardIndex, server: Server, tmp_path: Path, workers: int
) -> None:
    index = ShardIndex.load(server.url, remote_config(tmp_path))
    expected = collect(stream_of(local, **WINDOW), 0, 6)
    assert_equal(collect(stream_of(index, **WINDOW), 0, 6, 2, workers=workers), expected)
    keys = [key for step in range(6) for key in stream_of(local, **WINDOW).keys(step)]
    fetched = {name for name in server.requests if name.endswith(".tar")}
    assert shards_of(local, keys) <= fetched
    assert set(server.requests.values()) == {1}
    again = ShardIndex.load(server.url, remote_config(tmp_path))
    assert_equal(collect(stream_of(again, **WINDOW), 0, 6), expected)
    assert all(server.requests[name] == 1 for name in shards_of(local, keys))


def read_all(url: str, cache: Path, queue: "multiprocessing.SimpleQueue[object]") -> None:
    try:
        index = ShardIndex.load(url, remote_config(cache))
        queue.put(sum(len(index.read(env, r).image) for env in range(4) for r in range(18)))
    except Exception as error:
        queue.put(error)


def test_processes_share_the_cache(local: ShardIndex, server: Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=read_all, args=(server.url, tmp_path, queue)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    results = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    assert results == [sum(len(local.read(e, r).image) for e in range(4) for r in range(18))] * 4
    tars = {name: n for name, n in server.requests.items() if name.endswith(".tar")}
    assert len(tars) == len(local.shards)
    assert set(tars.values()) == {1}


def held(cache: Path) -> int:
    """Bytes in the cache, unfinished files included, while none is renamed."""
    with filelock.FileLock(cache / ".room.lock"):
        files = [path for path in cache.glob("*/*.tar*") if path.suffix != ".lock"]
        return sum(path.stat().st_size for path in files)


def test_the_cache_stays_within_its_bound(
    local: ShardIndex, server: Server, tmp_path: Path
) -> None:
    needed = stream_of(local, **WINDOW).shard_bytes_at_a_time()
    total = sum(shard.bytes for shard in local.shards)
    assert needed < 0.7 * total
    index = ShardIndex.load(server.url, remote_config(tmp_path, needed))
    expected = collect(stream_of(local, **WINDOW), 0, 40)
    stream = stream_of(index, **WINDOW)
    for step, batch in enumerate(stream.loader(0, 40)):
        assert held(tmp_path) <= needed
        assert (batch.labels == expected[step][1]).all()
        assert (batch.images == expected[step][0]).all()
    assert max(server.requests.values()) > 1, "shards came again in a later epoch"


def test_a_set_larger_than_the_cache_needs_windows(
    local: ShardIndex, server: Server, tmp_path: Path
) -> None:
    needed = stream_of(local, **WINDOW).shard_bytes_at_a_time()
    index = ShardIndex.load(server.url, remote_config(tmp_path, needed))
    for mode in ("permutation", "replacement"):
        with pytest.raises(
            DataConfigError, match=rf"data.cache_gib = .* GiB .*data.order {mode} needs all shards"
        ):
            stream_of(index, mode=mode)
    with pytest.raises(DataConfigError, match=r"raise data.cache_gib or lower data.order_window"):
        stream_of(index, mode="window", window=2)
    stream_of(index, **WINDOW)


def test_the_next_window_is_fetched_before_it_is_read(
    local: ShardIndex, server: Server, tmp_path: Path
) -> None:
    index = ShardIndex.load(server.url, remote_config(tmp_path))
    stream = stream_of(index, **WINDOW)
    next(iter(stream.loader(0, 1)))
    remote = index.reader.remote
    assert remote is not None
    assert remote._thread is not None
    remote._thread.join()
    live, following = stream.windows(0)
    assert following
    held_now = {path.name for path in remote.cache.folder.glob("*.tar")}
    assert held_now == {local.shards[shard].file for shard in (*live, *following)}


def test_passing_files_go_first_and_live_ones_last(tmp_path: Path) -> None:
    cache = node_cache(tmp_path, 50)

    def have(file: str) -> None:
        assert cache.obtain(file, 10, lambda path: path.write_bytes(bytes(10)))

    for number in range(5):
        have(f"{number}.tar")
        os.utime(cache.path(f"{number}.tar"), (number, number))
    cache.touch(["0.tar"])
    cache.touch(["4.tar"], passing=True)
    os.utime(cache.path("4.tar"), (0, 0))
    for file, gone in (("5.tar", "4.tar"), ("6.tar", "1.tar")):
        have(file)
        assert not cache.holds(gone)
    cache.live = frozenset({"2.tar", "3.tar"})
    have("7.tar")
    assert {p.name for p in cache.folder.glob("*.tar")} == {f"{i}.tar" for i in (2, 3, 5, 6, 7)}
    with pytest.raises(DataConfigError, match=r"has no room for 9\.tar \(51 bytes\)"):
        cache.obtain("9.tar", 51, lambda path: None)


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    cache = node_cache(tmp_path, 20)
    cache.path("a.tar.partial").write_bytes(bytes(15))
    assert cache.obtain("b.tar", 10, lambda path: path.write_bytes(bytes(10)))
    assert not cache.path("a.tar.partial").exists()
    cache.path("b.tar.partial").write_bytes(bytes(5))
    with cache.path("b.tar").open("rb") as stream:
        assert cache.discard("b.tar", stream.fileno())
    assert cache.obtain("b.tar", 10, lambda path: path.write_bytes(bytes(10)))
    assert [p.name for p in sorted(cache.folder.glob("b.tar*"))] == ["b.tar", "b.tar.lock"]


def test_evaluation_reads_remote_shards_one_after_the_other(
    local: ShardIndex, server: Server, tmp_path: Path
) -> None:
    """With room for two shards, an order by split would fetch shards over and over."""
    from tests.shards.stream.test_evaluation import load

    largest = max(shard.bytes for shard in local.shards)
    index = ShardIndex.load(server.url, remote_config(tmp_path, 2 * largest))
    labels = sorted(label for b in load(local, 2, "in") for label in b.labels.tolist())
    found = [label for b in load(index, 2, "in") for label in b.labels.tolist()]
    assert sorted(found) == labels
    assert {n for name, n in server.requests.items() if name.endswith(".tar")} == {1}


# Faults 12 and 13: what arrives is not what was promised, or does not arrive.


def cuts(local: ShardIndex) -> dict[str, int]:
    """Where a shard may be cut: within a payload, a header, at a member's end, in the padding."""
    (shard,) = [n for n, info in enumerate(local.shards) if info.file == SHARD]
    row = next(row for row in local.table(0) if int(row["shard"]) == shard)
    start, size = int(row["offset"]), int(row["size"])
    return {
        "all": 0,
        "header": start - 512 + 100,
        "before payload": start,
        "payload": start + size // 2,
        "end of payload": start + size,
        "member boundary": -(-(start + size) // 512) * 512,
        "one byte": (local.root / SHARD).stat().st_size - 1,
    }


@pytest.mark.parametrize(
    "where", ["all", "header", "before payload", "payload", "end of payload", "member boundary",
              "one byte"],
)  # fmt: skip
def test_every_cut_is_found(local: ShardIndex, server: Server, tmp_path: Path, where: str) -> None:
    keep = cuts(local)[where]
    size = (local.root / SHARD).stat().st_size
    server.script[SHARD] = [lambda data: data[:keep]]
    server.forever.add(SHARD)
    index = ShardIndex.load(server.url, remote_config(tmp_path, retries=2))
    with pytest.raises(
        DamagedDataError,
        match=rf"/sets/one/{SHARD}: bytes {keep}, the index promises {size} \(3 attempts\)",
    ):
        list(stream_of(index).loader(0, 9, workers=1))
    assert server.requests[SHARD] % 3 == 0
    assert not list(tmp_path.glob(f"*/{SHARD}")), "nothing unverified under the final name"
    pipe = ShardIndex.load(
        f"pipe:head -c {'$(test {} = ' + SHARD + f' && echo {keep} || echo 99999999)'} "
        f"{local.root}/{{}}",
        remote_config(tmp_path / "pipe", retries=0),
    )
    with pytest.raises(DamagedDataError, match=rf"bytes {keep}, the index promises {size}"):
        list(stream_of(pipe).loader(0, 9))


@pytest.mark.parametrize("place", [0.0, 0.1, 0.35, 0.6, 0.85, 0.9999])
def test_every_flip_is_found(
    local: ShardIndex, server: Server, tmp_path: Path, place: float
) -> None:
    def flip(data: bytes) -> bytes:
        at = int(place * len(data))
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    server.script[SHARD] = [flip]
    server.forever.add(SHARD)
    index = ShardIndex.load(server.url, remote_config(tmp_path, retries=1))
    with pytest.raises(
        DamagedDataError, match=rf"{SHARD}: sha256 .*the index promises .*2 attempts"
    ):
        list(stream_of(index).loader(0, 9))
    server.forever.clear()
    server.script[SHARD] = [flip]
    index = ShardIndex.load(server.url, remote_config(tmp_path, retries=1))
    assert_equal(collect(stream_of(index), 0, 9), collect(stream_of(local), 0, 9))


@pytest.mark.parametrize(
    "answers", [[503], [503, 500, 503], ["cut"], ["cut", 503], ["stall"], [lambda d: d[:100]]]
)
def test_passing_faults_cost_nothing_but_time(
    local: ShardIndex, server: Server, tmp_path: Path, answers: list[object]
) -> None:
    for name in (SHARD, "index.json", "folder-art.npy"):
        if not callable(answers[0]) or name != "index.json":
            server.script[name] = list(answers)  # type: ignore[arg-type]
    deadline = 1.2 if "stall" in answers else 20.0
    index = ShardIndex.load(server.url, remote_config(tmp_path, deadline=deadline))
    assert_equal(collect(stream_of(index), 0, 9), collect(stream_of(local), 0, 9))
    assert server.requests[SHARD] == len(answers) + 1


@pytest.mark.parametrize(
    ("answer", "match", "attempts"),
    [
        (404, "HTTP status 404", 1),
        (403, "HTTP status 403", 1),
        (503, "HTTP status 503", 3),
        ("cut", r"connection closed after \d+ of \d+ bytes", 3),
        ("length abc", r"connection closed after \d+ of abc bytes", 3),
    ],
)
def test_lasting_faults_end_the_run(
    server: Server, tmp_path: Path, answer: int | str, match: str, attempts: int
) -> None:
    server.script[SHARD] = [answer]
    server.forever.add(SHARD)
    index = ShardIndex.load(server.url, remote_config(tmp_path, retries=2))
    with pytest.raises(
        StorageError, match=rf"{SHARD}: cannot be had \({match}\) in {attempts} attempts? within 20"
    ):
        list(stream_of(index).loader(0, 9, workers=1))


def test_a_stall_ends_within_the_deadline(server: Server, tmp_path: Path) -> None:
    server.script["index.json"] = ["stall"]
    server.forever.add("index.json")
    started = time.monotonic()
    with pytest.raises(
        StorageError, match=r"index.json: cannot be had \(.*timed out.*within 0.4 s"
    ):
        ShardIndex.load(server.url, remote_config(tmp_path, deadline=0.4, retries=1))
    assert server.requests["index.json"] == 2
    assert time.monotonic() - started < 20, "the server would stay silent for longer"


@pytest.mark.parametrize("name", ["index.json", "folder-art.npy", SHARD])
def test_no_more_is_taken_than_was_promised(
    local: ShardIndex, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("shards.read.remote.INDEX_LIMIT", 100_000)
    most = max(100_000, (local.root / name).stat().st_size)
    endless = f"pipe:cat {local.root}/{{}}; case {{}} in {name}) cat /dev/zero;; esac"
    server.script[name] = ["endless"]
    server.forever.add(name)
    for number, root in enumerate((server.url, endless)):
        cache = tmp_path / str(number)
        with pytest.raises(DamagedDataError, match=r"gives more than \d+ bytes \(2 attempts\)"):
            list(stream_of(ShardIndex.load(root, remote_config(cache, retries=1))).loader(0, 9))
        assert all(path.stat().st_size <= most for path in cache.rglob("*"))
    assert server.sent[name] < 2 * most + 64 * 2**20, "the connection was closed"


@pytest.mark.parametrize(
    "target", ["ftp://127.0.0.1/x", "file:///etc/hostname", "data:,x", "gopher:x"]
)
def test_web_servers_lead_to_web_servers_alone(server: Server, tmp_path: Path, target: str) -> None:
    server.script["index.json"] = [f"to {target}"]
    with pytest.raises(StorageError, match=r"HTTP status 302 \(.*\)\) in 1 attempt"):
        ShardIndex.load(server.url, remote_config(tmp_path))
    server.script["index.json"] = [f"to {server.url.replace('one', 'two')}/index.json"]
    ShardIndex.load(server.url, remote_config(tmp_path))


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"Connection refused.* in 2 attempts"):
        ShardIndex.load("http://127.0.0.1:9/x", remote_config(tmp_path, retries=1))


def children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


@pytest.mark.parametrize(
    ("command", "match"),
    [
        ("cat {root}/{{}}; echo no such bucket >&2; exit 3", "ended with 3: no such bucket"),
        ("head -c 10 {root}/{{}}; sleep 60 | cat", "nothing came for 0.3 s"),
        ("sleep 60", "nothing came for 0.3 s"),
        ("no-such-program-at-all {{}}", "ended with 127: .*not found"),
    ],
)
def test_commands_that_fail(
    local: ShardIndex, tmp_path: Path, command: str, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By a clock that stands each attempt has its whole share, on a busy machine, too.
    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=time.sleep)
    monkeypatch.setattr("shards.read.retry.time", clock)
    before = children()
    root = "pipe:" + command.format(root=local.root)
    root = root if "{}" in root else root + " # {}"
    with pytest.raises(StorageError, match=rf"{match}.* in 2 attempts"):
        ShardIndex.load(root, remote_config(tmp_path, deadline=0.6, retries=1))
    assert children() == before, "what was started was ended"


def test_a_copy_damaged_in_the_cache_is_fetched_again(
    local: ShardIndex, server: Server, tmp_path: Path
) -> None:
    index = ShardIndex.load(server.url, remote_config(tmp_path))
    expected = collect(stream_of(local), 0, 9)
    assert_equal(collect(stream_of(index), 0, 9), expected)
    (copy,) = tmp_path.glob(f"*/{SHARD}")
    for offset in range(0, copy.stat().st_size, 64):
        damage(copy, offset)
    assert_equal(collect(stream_of(index), 0, 9), expected)
    assert server.requests[SHARD] == 2


def test_cache_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"data.cache_dir = '.*/file': cannot be written"):
        ShardIndex.load(server.url, remote_config(tmp_path / "file"))
    with pytest.raises(DataConfigError, match=r"data.cache_dir is not set: data.root = 'http"):
        ShardIndex.load(server.url)
    assert not server.requests, "found before anything is asked for"


@pytest.mark.parametrize("name", [SHARD, "folder-art.npy"])
def test_full_disk_is_an_output_error(local: ShardIndex, name: str) -> None:
    """/dev/full takes no byte; the table is smaller than a buffer."""
    with pytest.raises(OutputError, match=r"data.cache_dir: cannot write /dev/full"):
        fetch(file_url(local.root.as_uri(), name), Path("/dev/full"), DataConfig())


def test_whatever_the_cache_cannot_write_is_an_output_error(tmp_path: Path) -> None:
    cache = node_cache(tmp_path, 1000)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def silent(path: Path) -> None:
        raise StorageError("the server is silent")

    with pytest.raises(OutputError, match=r"cannot write .*/a.tar \(No space left on device\)"):
        cache.obtain("a.tar", 10, full)
    with pytest.raises(StorageError, match="the server is silent"):
        cache.obtain("a.tar", 10, silent)
    assert not cache.holds("a.tar")


def test_a_server_with_a_certificate(
    local: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    with Server(local.root, tls) as server:
        with pytest.raises(StorageError, match=r"not trusted: .*SSL_CERT_FILE .* in 1 attempt "):
            ShardIndex.load(server.url, remote_config(tmp_path / "cache"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        server.script[SHARD] = ["cut", 503]
        index = ShardIndex.load(server.url, remote_config(tmp_path / "cache"))
        assert_equal(collect(stream_of(index), 0, 9), collect(stream_of(local), 0, 9))
        assert server.requests[SHARD] == 3


def test_roots_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(DataConfigError, match=r"nothing opens xx://; .*'pipe:COMMAND xx://b/\{\} "):
        ShardIndex.load("xx://b/", remote_config(tmp_path))
    with pytest.raises(DataConfigError, match=r"the command needs \{\} where the file name"):
        ShardIndex.load("pipe:cat x", remote_config(tmp_path))
    with pytest.raises(DataConfigError, match=r"'http://\[bad/x': no URL \(Invalid IPv6"):
        ShardIndex.load("http://[bad/x", remote_config(tmp_path))
    with pytest.raises(DataConfigError, match=r"no URL \(Port could not be cast"):
        ShardIndex.load("http://host:port/x", remote_config(tmp_path))


def test_secrets_in_roots_are_not_told(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataConfigError, match=r"netrc http://host/set/\{\}'") as refused:
        ShardIndex.load("http://user:secret@host/set?sig=secret", remote_config(tmp_path))
    server.script["index.json"] = [404]
    with pytest.raises(StorageError, match=r"/sets/one/index\.json\?\.\.\.: .* 404") as missing:
        ShardIndex.load(server.url + "?sig=secret", remote_config(tmp_path))
    server.script["folder-art.npy"] = [lambda data: data[1:]]
    server.forever.add("folder-art.npy")
    with pytest.raises(DamagedDataError, match=r"/folder-art\.npy\?\.\.\.: sha256") as damaged:
        ShardIndex.load(server.url + "?sig=secret", remote_config(tmp_path, retries=0))
    server.script["index.json"] = [lambda data: b"{}"]
    with pytest.raises(DamagedDataError, match="not a shard index") as other:
        ShardIndex.load(server.url + "?sig=secret", remote_config(tmp_path))
    with pytest.raises(StorageError, match="of https://host/x") as command:
        ShardIndex.load(
            "pipe:echo no bucket of https://user:secret@host/x?k=secret >&2; false {}",
            remote_config(tmp_path, retries=0),
        )
    with pytest.raises(DataConfigError, match="nothing opens xx://") as unknown:
        ShardIndex.load("xx://user:secret@bucket/x?k=secret", remote_config(tmp_path))
    for caught in (refused, missing, damaged, other, command, unknown):
        assert "secret" not in str(caught.value)
    (problem,) = DataConfig(root="http://host/set?sig=secret").problems()
    assert "secret" not in problem


@pytest.mark.parametrize("text", ["", "<html>", "[]", '{"shards": [{}]}'])
def test_index_that_is_none(local: ShardIndex, tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DamagedDataError, match=r"index.json: not a shard index"):
        ShardIndex.load(tmp_path.as_uri(), remote_config(tmp_path / "cache"))


def test_only_the_original_can_be_verified(local: ShardIndex, tmp_path: Path) -> None:
    index = ShardIndex.load(local.root.as_uri(), remote_config(tmp_path))
    with pytest.raises(DataConfigError, match="verify it where it is stored"):
        verify_shards(index, deep=False)
