"""`--verify`: every kind of damage to a set is found and named."""

import io
import json
import logging
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from shards.read.index import ShardIndex
from shards.read.layout import file_sha256, section_digest
from shards.write.verify import verify_shards
from shards.writer import write_shards
from tests.support.shards_fixtures import FOLDER, damage, image_bytes, make_folder, make_set


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return make_set(tmp_path_factory.mktemp("verify"), per_class=5, domains=("art", "photo"))


@pytest.fixture
def index(whole: ShardIndex, tmp_path: Path) -> ShardIndex:
    shutil.copytree(whole.root, tmp_path / "set")
    return ShardIndex.load(tmp_path / "set")


def vouch_for(root: Path, shard: str) -> ShardIndex:
    """Make the index agree with a changed shard's size and hash: only its content tells."""
    path = root / "index.json"
    content = json.loads(path.read_text())
    for entry in content["shards"]:
        if entry["file"] == shard:
            entry["bytes"] = (root / shard).stat().st_size
            entry["sha256"] = file_sha256(root / shard)
    content["digests"]["shards"] = section_digest(content["shards"])
    path.write_text(json.dumps(content))
    return ShardIndex.load(root)


Members = list[tuple[str, bytes]]


def rewrite(path: Path, change: Callable[[Members], Members]) -> None:
    """Write a shard again with other members."""
    with tarfile.open(path) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_a_sound_set_has_no_problem_whatever_the_number_of_processes(index: ShardIndex) -> None:
    assert verify_shards(index, deep=True, jobs=1).problems == []
    assert verify_shards(index, deep=True, jobs=2).problems == []


def test_every_byte_counts(index: ShardIndex) -> None:
    path = index.root / index.shards[1].file
    size = path.stat().st_size
    for offset in range(3, size, 977):
        damage(path, offset)
        problems = verify_shards(index, deep=False).problems
        assert any(f"{path}: " in line and "sha256 differs" in line for line in problems), offset
        damage(path, offset)
    assert verify_shards(index, deep=False).problems == []


def test_members_are_compared_one_by_one(index: ShardIndex) -> None:
    shard = index.shards[0].file
    original = (index.root / shard).read_bytes()
    cases: dict[str, tuple[Callable[[Members], Members], str]] = {
        "label away": (lambda m: m[1:], "0 members of kind cls, expected 1"),
        "image away": (lambda m: [m[0], *m[2:]], "0 members of kind image, expected 1"),
        "text away": (lambda m: [*m[:2], *m[3:]], "0 members of kind json, expected 1"),
        "label twice": (lambda m: [*m, m[0]], "2 members of kind cls, expected 1"),
        "stranger": (lambda m: [*m, ("x.jpg", b"x")], "member x.jpg is not in the index"),
        "other label": (lambda m: [(m[0][0], b"7"), *m[1:]], "label 7, expected "),
        "no label": (lambda m: [(m[0][0], b"cat"), *m[1:]], "its .cls is not readable"),
        "no text": (lambda m: [*m[:2], (m[2][0], b"{"), *m[3:]], "its .json is not readable"),
        "list": (lambda m: [*m[:2], (m[2][0], b"[]"), *m[3:]], "its .json does not give domain"),
        "order": (lambda m: [*m[3:6], *m[:3], *m[6:]], " bytes at offset "),
        "image": (
            lambda m: [m[0], (m[1][0], m[1][1][:-1] + b"?"), *m[2:]],
            "): crc32 differs from the index",
        ),
        "cut": (lambda m: m[:-3], " is missing"),
    }
    bad = {"image": 1, "cut": 1, "stranger": 0, "no text": 0}  # most others move what follows
    for name, (change, message) in cases.items():
        (index.root / shard).write_bytes(original)
        rewrite(index.root / shard, change)
        problems, bad_images = verify_shards(vouch_for(index.root, shard), deep=False)
        assert any(message in line for line in problems), (name, problems)
        if name in bad:
            assert bad_images == bad[name], name
        assert all(line.startswith(f"{index.root / shard}: ") for line in problems)
    (index.root / shard).write_bytes(original)
    assert verify_shards(vouch_for(index.root, shard), deep=False).problems == []


def test_many_problems_of_a_shard_are_counted(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.write.verify._MAX_LINES", 3)
    rewrite(index.root / index.shards[0].file, lambda m: m[:3])
    problems = verify_shards(index, deep=False).problems
    assert len(problems) == 4
    found = 1 + index.shards[0].samples - 1  # the hash, and every sample but the first
    assert problems[-1].endswith(f"and {found - 3} more problems")


def test_files_beside_the_shards(index: ShardIndex) -> None:
    stray = index.root / "folder-art-000099.tar"
    shutil.copy(index.root / index.shards[0].file, stray)
    assert verify_shards(index, deep=False).problems == [
        f"{stray}: a shard that is not in the index; other readers may use it"
    ]
    stray.unlink()
    info = index.root / "_info.json"
    content = json.loads(info.read_text())
    content["splits"]["art"]["num_samples"] += 1
    info.write_text(json.dumps(content))
    assert verify_shards(index, deep=False).problems == [
        f"{info}: does not describe the shards of the index"
    ]
    info.unlink()
    (problem,) = verify_shards(index, deep=False).problems
    assert problem.startswith(f"{info}: cannot be read")


def test_incomplete_images_are_told_but_no_problem(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)  # progress is no news
    root = make_folder(tmp_path / "images", domains=("art",), per_class=4)
    photo = image_bytes(1, "JPEG", size=(200, 200))
    (root / "art/cat/im001.jpg").write_bytes(photo[: len(photo) // 2])
    (root / "art/dog/im001.jpg").write_bytes(photo[:100])
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(root / "art/dog/im002.png")
    index = write_shards(root, tmp_path / "out", FOLDER)
    assert verify_shards(index, deep=False).problems == []
    assert caplog.text == ""
    (problem,), bad_images = verify_shards(index, deep=True)
    assert "sample art-0000005 (art/dog/im001.jpg): cannot be decoded (" in problem
    told = "sample art-0000001 (art/cat/im001.jpg): the image is incomplete (image file is truncate"
    assert told in caplog.text
    assert "16-bit grey images, scaled to 8 bits when they are read: 1" in caplog.text
    assert bad_images == 2
    problems = verify_shards(index, deep=True, max_pixels=200 * 200 - 1).problems
    assert any("art/cat/im001.jpg): cannot be decoded (Image size (40000 p" in p for p in problems)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_an_image_without_a_description_is_named_by_key(index: ShardIndex) -> None:
    for text in (b"{", b"[]", b"{}"):
        path = index.root / index.shards[0].file
        rewrite(path, lambda m, text=text: [m[0], (m[1][0], b"?"), (m[2][0], text), *m[3:]])  # type: ignore[misc]
        problems, bad_images = verify_shards(index, deep=False)
        assert any(re.search(r": sample art-\d{7}: 1 bytes at offset", line) for line in problems)
        assert bad_images == index.shards[0].samples  # those that follow lie elsewhere now


def test_a_shard_that_goes_away_meanwhile(index: ShardIndex) -> None:
    (index.root / index.shards[1].file).unlink()
    (problem,), bad_images = verify_shards(index, deep=False)
    assert bad_images == index.shards[1].samples
    assert f"{index.shards[1].file}: cannot be read" in problem
    assert FOLDER.name == index.dataset
