"""Sets made to do harm: refused at opening with the entry, whatever their own hashes say."""

import contextlib
import json
import os
import random
import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import DamagedDataError, DataConfigError
from shards.read.checking import INDEX_LIMIT
from shards.read.index import ShardIndex
from shards.read.layout import file_sha256, section_digest
from shards.read.subset import read_subset
from shards.write.verify import verify_shards
from tests.support.shards_fixtures import make_set
from tests.support.shards_server import remote_config

Content = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("checking"), per_class=4).root


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "set"))


def edit(folder: Path, change: Callable[[Content], object]) -> None:
    """Changes an index and all that vouches for it."""
    path = folder / "index.json"
    content = json.loads(path.read_text())
    change(content)
    if isinstance(content.get("digests"), dict):
        content["digests"] = {
            name: section_digest(content.get(name)) for name in content["digests"]
        }
    path.write_text(json.dumps(content))


def put(section: str, name: str, value: object, place: int = 1) -> Callable[[Content], object]:
    return lambda content: content[section][place].update({name: value})


NAMES = [
    "../../x.tar",
    "/x.tar",
    "a b.tar",
    "$(x).tar",
    "-f.tar",
    ".tar",
    "a/b.tar",
    "index.json",
    None,
]
ENTRIES = [
    *(("shards", "file", name, "is no file name of a shard set") for name in NAMES),
    ("shards", "file", "folder-art-000000.tar", "is there before"),
    *(("shards", "bytes", n, "is no number from 0") for n in (-1, 2**63, 1.5, True, None, "9")),
    ("shards", "samples", int("9" * 4000), "is no number from 0"),
    ("shards", "sha256", "0", "is no sha256"),
    ("domains", "table", "../folder-art.npy", "is no file name of a shard set"),
    *(("domains", "name", name, "is no name") for name in ("../../up", "..", "", "a\0", 3)),
    ("domains", "key_prefix", "a/b", "is no key_prefix"),
    ("domains", "name", "art", "is there before"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "name", "value", "why"), ENTRIES)
def test_every_entry_of_an_index_is_checked(
    folder: Path, tmp_path: Path, section: str, name: str, value: object, why: str
) -> None:
    edit(folder, put(section, name, value))
    with pytest.raises(DamagedDataError, match=rf"{section}\[1\]\.{name} = .* {why}") as caught:
        ShardIndex.load(folder)
    assert len(str(caught.value)) < 500
    cache = tmp_path / "cache"
    with pytest.raises(DamagedDataError, match=rf"{section}\[1\]\.{name} = .* {why}"):
        ShardIndex.load(folder.as_uri(), remote_config(cache))
    assert [path.name for path in cache.rglob("*")] == ["index"], "nothing of it is kept"


@pytest.mark.parametrize(
    "change",
    [
        {"classes": None}, {"classes": []}, {"classes": ["cat", 3]}, {"classes": "cat"},
        {"domains": {}}, {"shards": None}, {"shards": [None]}, {"dataset": None},
        {"digests": None}, {"digests": [1]}, {"format_version": None},
    ],
)  # fmt: skip
def test_sections_of_another_kind(folder: Path, change: Content) -> None:
    edit(folder, lambda content: content.update(change))
    with pytest.raises((DamagedDataError, DataConfigError), match=r"index\.json: "):
        ShardIndex.load(folder)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, '{"format_version": ' + "1" * 6000 + "}", "null", "\0"],
)  # fmt: skip
def test_texts_that_trip_a_parser(folder: Path, text: str) -> None:
    (folder / "index.json").write_text(text)
    with pytest.raises(DamagedDataError, match=r"index\.json: not a shard index"):
        ShardIndex.load(folder)


def retable(folder: Path, change: Callable[[Any], object]) -> None:
    """Changes the table of the first domain, for which the index then vouches."""
    path = folder / "folder-art.npy"
    table = np.load(path)
    change(table)
    np.save(path, table)
    edit(folder, put("domains", "sha256", file_sha256(path), place=0))


@pytest.mark.parametrize(
    ("column", "value"),
    [("label", 99), ("shard", 9999), ("offset", 2**63), ("size", 2**32 - 1), ("rank", 0)],
)
def test_every_row_of_a_table_is_checked(folder: Path, column: str, value: int) -> None:
    def change(table: Any) -> None:
        table[column][5] = value

    retable(folder, change)
    with pytest.raises(
        DamagedDataError, match=rf"folder-art\.npy: sample 5 has {column} {value}, which is not in"
    ):
        ShardIndex.load(folder)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as place:
        place.bind(os.path.relpath(path))


def a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link_out(path: Path) -> None:
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize("file", ["index.json", "folder-art.npy", "folder-art-000000.tar"])
@pytest.mark.parametrize("become", [a_pipe, a_socket, a_device, a_folder, a_link_out])
def test_only_regular_files_of_the_folder_are_read(
    folder: Path, file: str, become: Callable[[Path], None]
) -> None:
    become(folder / file)
    with pytest.raises(DamagedDataError, match=rf"{file}: (no regular file|a link that leaves)"):
        ShardIndex.load(folder)


def test_what_hangs_nobody(folder: Path) -> None:
    index = ShardIndex.load(folder)
    for file in ("folder-art.npy", "folder-art-000000.tar"):
        (folder / file).rename(folder / "away")
        (folder / file).symlink_to(file)  # to itself
        with pytest.raises(DamagedDataError, match="Too many levels of symbolic links"):
            ShardIndex.load(folder)
        (folder / "away").replace(folder / file)
    a_pipe(folder / "_info.json")
    (problem,) = verify_shards(index, deep=False).problems
    assert "_info.json: no regular file" in problem


def test_a_link_within_the_folder_is_none_that_leaves_it(folder: Path, tmp_path: Path) -> None:
    (folder / "store").mkdir()
    for file in ("index.json", "folder-art.npy", "folder-art-000000.tar"):
        (folder / file).rename(folder / "store" / file)
        (folder / file).symlink_to(Path("store") / file)
    index = ShardIndex.load(folder)
    a_link_out(folder / "folder-photo.npy")
    with pytest.raises(DamagedDataError, match="cp -rL"):
        ShardIndex.load(folder)
    remedy = Path(shutil.copytree(folder, tmp_path / "copy", symlinks=False))  # what it advises
    assert ShardIndex.load(remedy).read(0, 0) == index.read(0, 0)


def test_files_that_are_too_large_are_not_read(folder: Path) -> None:
    os.truncate(folder / "folder-art.npy", 1 << 40)  # full of holes
    with pytest.raises(DamagedDataError, match=r"folder-art\.npy: too long for 8 samples"):
        ShardIndex.load(folder)
    os.truncate(folder / "index.json", INDEX_LIMIT + 1)
    with pytest.raises(DamagedDataError, match=r"index\.json: more than \d+ bytes, so no index"):
        ShardIndex.load(folder)


# A fuzz with a seed: every change is refused in our words, or harmless.

ODD = (b"\0", b"\xff", b"-1", b"9" * 20, b"null", b"../", b"[", b"{", b'"', b"1e999", b"\\ud800")


def mutated(draw: random.Random, data: bytes, until: int | None = None) -> bytes:
    """Some bytes changed, cut out or put in, up to a place."""
    found = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(until or len(data))
        what = draw.choice(ODD) if draw.random() < 0.7 else draw.randbytes(4)
        found[at : at + draw.choice((0, 1, len(what), 40))] = what
    return bytes(found)


def tried(action: Callable[[], object]) -> bool:
    """Whether an action ends well; an error that is none of ours passes through."""
    try:
        action()
    except (DamagedDataError, DataConfigError):
        return False
    return True


def test_mutated_indexes_tables_and_lists(folder: Path, tmp_path: Path) -> None:
    draw, outcomes = random.Random(15), []
    before = sorted(tmp_path.rglob("*"))
    index = (folder / "index.json").read_bytes()
    for _ in range(400):
        (folder / "index.json").write_bytes(mutated(draw, index))
        with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError):
            edit(folder, lambda content: content)  # if it is one, it vouches for itself
        outcomes.append(tried(lambda: ShardIndex.load(folder)))
    table = (folder / "folder-art.npy").read_bytes()
    for _ in range(300):
        (folder / "index.json").write_bytes(index)
        (folder / "folder-art.npy").write_bytes(mutated(draw, table, 200))
        sha256 = file_sha256(folder / "folder-art.npy")
        edit(folder, put("domains", "sha256", sha256, place=0))
        outcomes.append(tried(lambda: ShardIndex.load(folder)))
    assert 10 < sum(outcomes) < 300, "most are refused, and some are only spaces"
    (folder / "folder-art.npy").write_bytes(table)
    (folder / "index.json").write_bytes(index)
    opened, listed = ShardIndex.load(folder), folder / "list"
    for _ in range(200):
        line = mutated(draw, b"art-0000002\nart/cat/im001.jpg\nphoto-0000001" + b"9" * 6000)
        listed.write_bytes(line)
        tried(lambda: read_subset(opened, str(listed), None))
    listed.unlink()
    assert sorted(tmp_path.rglob("*")) == before, "no file anywhere"


def test_mutated_shards(folder: Path) -> None:
    """Headers of all kinds that tar has, with sizes of any number; the hash is of no concern."""
    draw, index = random.Random(16), ShardIndex.load(folder)
    (folder / "list").write_text("art/cat/im001.jpg\nart/nothing.jpg\n")
    shard = folder / index.shards[0].file
    data = shard.read_bytes()
    kinds = b"0123456789gxLKSVM\0"
    for _ in range(250):
        changed = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            at = 512 * draw.randrange(len(data) // 512)
            header = bytearray(mutated(draw, bytes(changed[at : at + 512]), 160).ljust(512))[:512]
            sizes = b"77777777777\0", b"\x80" + draw.randbytes(11), b"\xff" * 12, header[124:136]
            header[124:136], header[156] = draw.choice(sizes), draw.choice(kinds)
            total = sum(header[:148]) + sum(header[156:]) + 8 * 32
            header[148:156] = b"%06o\0 " % total
            changed[at : at + 512] = header
        shard.write_bytes(changed)
        tried(lambda: read_subset(index, str(folder / "list"), None))
        assert verify_shards(index, deep=False).problems


def test_a_member_that_swallows_memory_or_links_in_a_circle(folder: Path) -> None:
    index = ShardIndex.load(folder)
    shard = folder / index.shards[0].file
    types = tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE, tarfile.REGTYPE
    for kind, size in zip(types, (0, 1 << 40, 1 << 60), strict=True):
        member = tarfile.TarInfo("art-0000000.json")
        member.type, member.linkname, member.size = kind, "art-0000000.json", size
        shard.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        (line, *_) = [line for line in verify_shards(index, deep=False).problems if "plain" in line]
        assert "cannot be read (member 'art-0000000.json' is no plain file)" in line
