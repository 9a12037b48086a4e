"""Conversions that are killed, run out of space or cannot write: what stays, and what follows."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from shards.errors import DataConfigError, OutputError
from shards.read.index import ShardIndex
from shards.write import conversion, shard_file
from shards.write.worker_pool import run_tasks
from shards.writer import main, write_shards
from tests.support.shards_fixtures import FOLDER, damage, folder_bytes, image_bytes, make_folder

REPOSITORY = Path(__file__).resolve().parents[3]
# Python tells of every file it is about to open, list, rename or remove: there we end the writer.
KILLED_AT = """
import os, signal, sys
folder, moment = sys.argv[1], int(sys.argv[2])
seen = []
def watch(event, args):
    if event in {"open", "os.rename", "os.remove", "os.listdir"} and folder in str(args[0]):
        seen.append(event)
        if len(seen) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
from shards.write.worker_pool import run_tasks
from shards.writer import main
sys.addaudithook(watch)
code = main(sys.argv[3:])
print(*seen)
sys.exit(code)
"""
SHARD_SIZE = 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("whole")
    root = make_folder(folder / "images", domains=("art", "photo"))
    return write_shards(root, folder / "shards", FOLDER, shard_size=SHARD_SIZE)


def arguments(whole: ShardIndex, out: Path, *more: str) -> list[str]:
    images = str(whole.root.parent / "images")
    return ["--root", images, "--out", str(out), "--shard-size", str(SHARD_SIZE), *more]


def killed_at(moment: int, whole: ShardIndex, out: Path) -> subprocess.CompletedProcess[str]:
    """A conversion killed at the n-th time it touches a file."""
    folder = os.path.commonpath([whole.root, out])
    argv = [sys.executable, "-c", KILLED_AT, folder, str(moment)]
    return subprocess.run(
        [*argv, *arguments(whole, out, "--jobs", "1")],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def assert_nothing_is_half_there(out: Path, whole: ShardIndex) -> None:
    """Every file under a final name is whole; the index only with everything else."""
    there = folder_bytes(out) if out.exists() else {}
    final = folder_bytes(whole.root)
    for name, content in there.items():
        if name in final:
            assert content == final[name], name
        else:
            assert name == ".writer.state" or name.endswith(".partial"), name
    if "index.json" in there:
        assert final.keys() <= there.keys()
    else:
        with pytest.raises(DataConfigError, match=r"index\.json|does not exist"):
            ShardIndex.load(out)


@pytest.fixture(scope="module")
def events(whole: ShardIndex, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All the times an undisturbed conversion touches a file."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = killed_at(0, whole, out)
    assert done.returncode == 0, done.stderr
    assert folder_bytes(out) == folder_bytes(whole.root)
    return done.stdout.split()


@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("kind", ["anywhere", "at a rename"])
def test_killed_once_anywhere(
    whole: ShardIndex, events: list[str], tmp_path: Path, kind: str, tenth: int
) -> None:
    renames = [moment for moment, event in enumerate(events, 1) if event == "os.rename"]
    if kind == "anywhere":
        moment = 1 + tenth * (len(events) - 1) // 9
    else:  # nine files are renamed: state, five shards, two tables, info, index
        moment = renames[tenth * (len(renames) - 1) // 9] + tenth % 2
    out = tmp_path / "out"
    assert killed_at(moment, whole, out).returncode == -signal.SIGKILL
    assert_nothing_is_half_there(out, whole)
    assert main(arguments(whole, out, "--jobs", "1", "--verify", "--deep")) == 0
    assert folder_bytes(out) == folder_bytes(whole.root)


def test_killed_again_and_again_it_still_gets_on(whole: ShardIndex, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shards, kills = 0, 0
    while (done := killed_at(60, whole, out)).returncode != 0:
        assert done.returncode == -signal.SIGKILL
        assert_nothing_is_half_there(out, whole)
        assert len(list(out.glob("*.tar"))) >= shards + 1 or shards == len(whole.shards)
        shards = len(list(out.glob("*.tar")))
        kills += 1
    assert kills >= 2
    assert folder_bytes(out) == folder_bytes(whole.root)


KILLED_AFTER = """
import contextlib, os, signal, sys
from shards import writer
from shards.write import conversion
@contextlib.contextmanager
def progress(what, total):
    done = []
    def advance(images):
        done.append(images)
        if len(done) == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
    yield advance
conversion.progress = progress
if __name__ == "__main__":
    sys.exit(writer.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("shards", [1, 3])
def test_killed_with_several_processes(whole: ShardIndex, tmp_path: Path, shards: int) -> None:
    script, out = tmp_path / "killed_after.py", tmp_path / "out"
    script.write_text(KILLED_AFTER)
    done = subprocess.run(  # returns when the last process that holds its output has ended
        [sys.executable, str(script), str(shards), *arguments(whole, out, "--jobs", "2")],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert len(list(out.glob("*.tar"))) >= shards
    assert_nothing_is_half_there(out, whole)
    assert main(arguments(whole, out, "--jobs", "2")) == 0
    assert folder_bytes(out) == folder_bytes(whole.root)


def interrupted(whole: ShardIndex, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an unfinished conversion with three shards."""
    calls = iter(range(1000))
    plain = shard_file.pack_shard

    def pack(*args: object, **options: object) -> shard_file.PackedShard:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "pack_shard", pack)
        assert main(arguments(whole, out, "--jobs", "1")) == 130
    assert len(list(out.glob("*.tar"))) == 3


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}


def test_finished_shards_are_not_written_again(
    whole: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(whole, out, monkeypatch)
    (out / "folder-art-000001.tar.01234567.partial").write_bytes(b"what kill -9 leaves")
    before = times(out)
    assert main(arguments(whole, out)) == 0
    assert times(out).items() >= before.items()
    assert folder_bytes(out) == folder_bytes(whole.root)


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        *(("cut", place) for place in (0, 300, 512, 700, -9000, -1)),
        ("longer", 0),
        ("swapped", 0),
        ("flipped", 700),
        ("flipped", 2000),
    ],
)
def test_a_finished_shard_that_is_not_right_is_written_again(
    whole: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, damage: str, place: int,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    interrupted(whole, out, monkeypatch)
    path = out / "folder-art-000001.tar"
    data = path.read_bytes()
    other = (out / "folder-art-000000.tar").read_bytes()
    flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    contents = {
        "cut": data[:place],
        "longer": data + b"\0" * 512,
        "swapped": other,
        "flipped": flipped,
    }
    path.write_bytes(contents[damage])
    assert main(arguments(whole, out)) == 0
    assert "000001.tar: not as an earlier run wrote it" in caplog.text
    assert folder_bytes(out) == folder_bytes(whole.root)


def test_a_state_cut_short_costs_one_shard(
    whole: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(whole, out, monkeypatch)
    state = (out / ".writer.state").read_bytes()
    assert state.count(b"\n") == 4
    before = times(out)
    for cut in (1, 30, 64):
        (out / ".writer.state").write_bytes(state[:-cut])
        with monkeypatch.context() as patch:  # interrupted again at once
            patch.setattr(conversion, "run_tasks", lambda *_: iter(()))
            with pytest.raises(KeyError):
                write_shards(whole.root.parent / "images", out, FOLDER, shard_size=SHARD_SIZE)
        assert times(out).items() < before.items()
        assert len(times(out)) == 2
        assert (out / ".writer.state").read_bytes() == state[: state[:-1].rindex(b"\n") + 1]
    assert main(arguments(whole, out)) == 0
    assert folder_bytes(out) == folder_bytes(whole.root)


@pytest.mark.parametrize("place", [3, 140, 512, 700, 1600, -1])
def test_a_disk_that_stores_something_else_is_noticed(
    whole: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    plain = shard_file.replaced_when_whole

    @contextlib.contextmanager
    def lying(path: Path) -> Iterator[BinaryIO]:
        with plain(path) as stream:
            yield stream
        if path.name == "folder-photo-000000.tar":
            damage(path, place)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shard_file, "replaced_when_whole", lying)
        with pytest.raises(OutputError, match=r"photo-000000\.tar reads back differently"):
            write_shards(whole.root.parent / "images", out, FOLDER, shard_size=SHARD_SIZE)
    assert not (out / "folder-photo-000000.tar").exists()
    assert main(arguments(whole, out)) == 0
    assert folder_bytes(out) == folder_bytes(whole.root)


def test_other_settings_or_images_start_afresh(
    whole: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    shutil.copytree(whole.root.parent / "images", images)
    for change in ("shard size", "image", "domain"):
        out = tmp_path / change
        interrupted(whole, out, monkeypatch)
        if change == "image":  # the same number of bytes
            path = images / "art/cat/im000.png"
            path.write_bytes(path.read_bytes()[::-1])
        elif change == "domain":
            (images / "art").rename(images / "fine art")
        size = SHARD_SIZE - 1 if change == "shard size" else SHARD_SIZE
        if change == "domain":  # shards of a domain that is not among these
            with pytest.raises(OutputError, match=r"not empty, it holds 'folder-art-000000\.tar'"):
                write_shards(images, out, FOLDER, shard_size=size)
            continue
        write_shards(images, out, FOLDER, shard_size=size)
        fresh = tmp_path / f"{change} fresh"
        write_shards(images, fresh, FOLDER, shard_size=size)
        assert folder_bytes(out) == folder_bytes(fresh)


def test_shards_of_an_unknown_origin_are_not_touched(whole: ShardIndex, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "folder-art-000000.tar").write_bytes(b"precious")
    assert main(arguments(whole, out)) == 73
    assert (out / "folder-art-000000.tar").read_bytes() == b"precious"


def test_disk_full_in_the_middle(
    whole: ShardIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit on the size of files stands for the disk: real writes fail half-way."""
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(whole.root.parent / "images", images)
    big = b"".join(image_bytes(seed, size=(64, 64)) for seed in range(40))
    (images / "photo/dog/im003.jpg").write_bytes(big)
    largest = max(shard.bytes for shard in whole.shards) + 20 * 512
    assert len(big) > largest
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot be written \(File too large\); what is fin"):
            write_shards(images, out, FOLDER, shard_size=SHARD_SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    before = times(out)
    assert len(before) >= 3
    assert {path.name for path in out.iterdir()} == {".writer.lock", ".writer.state", *before}
    write_shards(images, out, FOLDER, shard_size=SHARD_SIZE)
    assert times(out).items() >= before.items()
    write_shards(images, tmp_path / "fresh", FOLDER, shard_size=SHARD_SIZE)
    assert folder_bytes(out) == folder_bytes(tmp_path / "fresh")


def test_disk_full_at_the_very_end_of_a_file(
    whole: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\)"):
            write_shards(whole.root.parent / "images", out, FOLDER)
    assert [path.name for path in out.iterdir()] == [".writer.lock"]


def test_too_little_space_is_said_before_writing(
    whole: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    free = SimpleNamespace(free=60_000)
    needed = sum(shard.bytes for shard in whole.shards)
    assert needed > free.free
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free)
        with pytest.raises(OutputError) as caught:
            write_shards(whole.root.parent / "images", out, FOLDER, shard_size=SHARD_SIZE)
        said = str(caught.value)
        assert "60000 bytes (0.0 GiB) free on its file system; free some space" in said
        said_bytes = int(said.split(": ")[1].split()[0])
        padding = 21 * 512 * len(whole.shards)  # the end of a tar file
        assert needed - padding <= said_bytes <= needed
        assert list(out.glob("*.tar*")) == []
    interrupted(whole, out, monkeypatch)
    left = said_bytes - sum(path.stat().st_size for path in out.glob("*.tar"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=left))
    write_shards(whole.root.parent / "images", out, FOLDER, shard_size=SHARD_SIZE)
    assert folder_bytes(out) == folder_bytes(whole.root)


def test_read_only_output(
    whole: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "file").write_text("")
    assert main(arguments(whole, tmp_path / "file" / "out")) == 73
    assert "file/out: cannot be written (Not a directory)" in caplog.text
    monkeypatch.setattr(os, "mkdir", refuse)
    assert main(arguments(whole, tmp_path / "out")) == 73
    assert "out: cannot be written (Read-only file system)" in caplog.text


def test_a_killed_worker_is_reported() -> None:
    with pytest.raises(OutputError, match="a worker process was killed, perhaps for lack of memo"):
        list(run_tasks(signal.raise_signal, [signal.SIGKILL] * 4, 2))
