"""CSV manifests, parquet in the Hub's layout and WebDataset archives give what the folder gives."""

import csv
import io
import json
import logging
import os
import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from shards.read.index import ShardIndex
from shards.write import conversion, shard_file
from shards.writer import main, write_shards
from tests.support.shards_fixtures import FOLDER, folder_bytes, make_folder

NAMES = ["dog", "cat"]  # a features' order that is not the sorted one
Paths = list[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """The folder's own shard set, beside the folder; some files are no images, one is empty."""
    folder = tmp_path_factory.mktemp("whole")
    root = make_folder(folder / "images", per_class=5)
    (root / "art/cat/a.v2 é.JPG").write_bytes(b"no image")
    (root / "art/cat/moving.gif").write_bytes(b"GIF89a")
    (root / "art/dog/im001.jpg").write_bytes(b"")
    return write_shards(root, folder / "shards", FOLDER, exclude=["photo/cat/im002.png"])


@pytest.fixture
def paths(whole: ShardIndex) -> Paths:
    """The folder's files in no order."""
    root = whole.root.parent / "images"
    files = sorted(str(path.relative_to(root)) for path in root.glob("*/*/*"))
    random.Random(1).shuffle(files)
    return files


def write_csv(file: Path, rows: list[dict[str, object]]) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return file


def hub_rows(root: Path, paths: Paths, whole_path: bool = False) -> Iterator[dict[str, object]]:
    for path in paths:
        domain, name, file = path.split("/")
        image = {"bytes": (root / path).read_bytes(), "path": path if whole_path else file}
        yield {"image": image, "label": NAMES.index(name), "domain": domain}


def write_parquet(file: Path, rows: list[dict[str, object]], **features: object) -> Path:
    features = {"label": {"names": NAMES, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    table = pa.Table.from_pylist(rows).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, file, row_group_size=7)
    return file


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        folder = tarfile.TarInfo("./a folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def lay_out(kind: str, source: Path, root: Path, paths: Paths) -> list[str]:
    """The images of a folder in another format; gives the flags that read them."""
    if kind == "csv":
        rows = [dict(zip(("domain", "class", "path"), (*p.split("/")[:2], p))) for p in paths]
        return ["--root", str(write_csv(source / "list.csv", rows)), "--columns", "label=class"]
    if kind.startswith("parquet"):
        rows = list(hub_rows(source, paths, whole_path="whole" in kind))
        write_parquet(root / "data/train-00000-of-00002.parquet", rows[:11])
        write_parquet(root / "data/train-00001-of-00002.parquet", rows[11:])
    for number, path in enumerate(paths if kind == "webdataset" else ()):
        domain, name, file = path.split("/")
        key, ending = f"./{domain}/{name}/{file.split('.')[0]}", file.split(".", 1)[1]
        members = {f"{key}.{ending}": (source / path).read_bytes(), f"{key}.txt": name.encode()}
        if ending != "gif":
            write_tar(root / domain / f"x-{number:06d}.tar", members)
    flags = ["--columns", "domain=@folder", "label=txt"] if kind == "webdataset" else []
    return ["--root", str(root), *flags]


@pytest.mark.parametrize("kind", ["csv", "parquet", "parquet, whole paths", "webdataset", "ours"])
def test_gives_what_the_folder_gives(
    whole: ShardIndex, paths: Paths, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    (tmp_path / "left_out.txt").write_text("photo/cat/im002.png\n")
    flags = ["--root", str(whole.root)]
    if kind != "ours":
        flags = lay_out(kind, whole.root.parent / "images", root, paths)
        flags += ["--exclude_list", str(tmp_path / "left_out.txt")]
    dataset = "webdataset" if kind == "ours" else kind.partition(",")[0]
    argv = ["--dataset", dataset, *flags, "--out", str(out), "--jobs", "1"]
    assert main(argv) == 0
    assert ("passed over: 1 .gif" in caplog.text) == (kind not in ("ours", "webdataset"))
    assert "im001.jpg is empty; it is stored" in caplog.text
    assert folder_bytes(out) == folder_bytes(whole.root)
    with caplog.at_level(logging.INFO):
        assert main([*argv, "--verify"]) == 0
    assert f"{out} already holds this set" in caplog.text
