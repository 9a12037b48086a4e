"""CSV manifests, parquet in the Hub's layout and WebDataset archives give what the folder gives."""

import csv
import io
import json
import logging
import os
import random
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

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
        split = [path.split("/") for path in paths]
        rows = [{"domain": d, "class": c, "path": f"{d}/{c}/{name}"} for d, c, name in split]
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


def small(root: Path, number: int = 4) -> tuple[Path, Paths]:
    paths = [f"{d}/{c}/{n}.png" for d in ("a", "b") for c in NAMES for n in range(number)]
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root, paths


def test_images_without_names_come_in_the_order_of_the_rows(tmp_path: Path) -> None:
    root, paths = small(tmp_path / "images")
    rows = [
        dict(row, image={"bytes": row["image"]["bytes"]}) for row in hub_rows(root, paths[::-1])
    ]  # type: ignore[index]
    for domain in "ab":
        mine = [row for row in rows if row.pop("domain", domain) == domain]
        write_parquet(tmp_path / "hub" / f"{domain}-00000-of-00001.parquet", mine)
    argv = ["--dataset=parquet", f"--root={tmp_path / 'hub'}", "--columns", "domain=@file", "path="]
    out = tmp_path / "out"
    assert main([*argv, "--out", str(out), "--jobs=1"]) == 0
    index = ShardIndex.load(out)
    read = [index.read(0, place).image.decode() for place in range(8)]
    assert read == [f"a/{name}/{number}.png" for name in ("cat", "dog") for number in (3, 2, 1, 0)]
    assert index.classes == ("cat", "dog")


def test_a_table_of_wilds_is_read_by_a_pattern(tmp_path: Path) -> None:
    root, paths = small(tmp_path / "images", number=1)
    split = [path.split("/") for path in paths]
    rows = [{"": i, "y": c, "center": "ab".index(d), "of": d} for i, (d, c, _) in enumerate(split)]
    write_csv(root / "metadata.csv", rows)
    write_csv(root / "other.csv", rows)
    columns = ["domain=center", "path={of}/{y}/0.png"]
    argv = ["--format=csv", f"--root={root}", f"--out={tmp_path / 'out'}", "--jobs=1", "--columns"]
    assert main([*argv, *columns]) == 0
    index = ShardIndex.load(tmp_path / "out")
    assert (index.domains, index.classes) == (("0", "1"), ("cat", "dog"))
    assert index.read(1, 0).image == b"b/cat/0.png"


def refused(caplog: pytest.LogCaptureFixture, tmp_path: Path, kind: str, *flags: str) -> str:
    """The one line that is said; nothing is written."""
    caplog.clear()
    code = main(["--dataset", kind, *flags, "--out", str(tmp_path / "out"), "--jobs=1"])
    assert code in (2, 65)
    assert not (tmp_path / "out").exists()
    (line,) = [text for text in caplog.text.splitlines() if "error:" in text]
    return f"{code} {line.partition('error: ')[2]}"


CSV_HEADER = "path,label,domain\n"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("../x.png,cat,a", "2 {}, line 18: '../x.png' is no plain path below a folder; mend"),
        ("/etc/x.png,cat,a", "line 18: '/etc/x.png' is no plain path"),
        ("a/\x1bb.png,cat,a", r"line 18: 'a/\x1bb.png' is no plain path"),
        ("a/cat/0.png,../cat,a", "line 18: '../cat/a/cat/0.png' is no plain path"),
        ("a/cat/0.png,cat,a/b", "line 18: 'a/b/' is no plain path"),
        ("a/cat/0.png,cat", "line 18: 2 values, expected 3"),
        ("a/cat/0.png,,a", "line 18: has no label (column 'label')"),
        ("./a/cat/0.png,dog,b", "line 18: 'a/cat/0.png' is in {}, line 6 already; leave one"),
        ("a/pipe.png,cat,a", "65 {root}/a/pipe.png: cannot be read (no plain file)"),
        ("a/none.png,cat,a", "65 {root}/a/none.png: cannot be read (No such file or directory)"),
        ('"a', "2 {}, after line 17: cannot be read as CSV in UTF-8 (unexpected end of data)"),
        ("a/cow.png,cow,a", "domain 'b' lacks the class 'cow' (in 1 of 2 domains)"),
    ],
)
def test_rows_of_a_manifest_that_cannot_be_taken_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: str, told: str
) -> None:
    root, paths = small(tmp_path / "images")
    os.mkfifo(root / "a" / "pipe.png")
    lines = [",".join([path, path.split("/")[1], path[0]]) for path in paths]
    file = root / "list.csv"
    file.write_text(CSV_HEADER + "".join(f"{line}\n" for line in [*lines, row]))
    said = refused(caplog, tmp_path, "csv", "--root", str(root))
    assert told.format(file, root=root) in said


def test_settings_of_formats_that_cannot_work_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, paths = small(tmp_path / "images")
    rows = list(hub_rows(root, paths))
    file = write_parquet(tmp_path / "hub.parquet", rows)

    def told(*flags: str, kind: str = "parquet", of: Path = file) -> str:
        return refused(caplog, tmp_path, kind, "--root", str(of), *flags)

    def with_row(**changes: object) -> str:
        return told(of=write_parquet(tmp_path / "bad.parquet", [*rows, {**rows[0], **changes}]))

    assert "there is no 'label_'; there are image, label, domain, @file; name one with" in told(
        "--columns", "label=label_"
    )
    assert "did you mean 'label'?" in told("--columns", "label=label_")
    assert "--columns lbel=: legal: image, label" in told("--columns", "lbel=x")
    assert "not with --format folder; legal: csv, " in told("--columns", "x=y", kind="folder")
    assert "no folder that holds *.tar files" in told(kind="webdataset", of=root)
    nothing = write_parquet(tmp_path / "bad.parquet", [{"image": b""}])
    assert "there is none for the domain (domain); there are image, @file; name one" in told(
        "--columns", "label=image", of=nothing
    )
    assert "bad.parquet, row 16: label is 2, outside the 2 names" in with_row(label=2)
    assert "row 16: label is -1, outside" in with_row(label=-1)
    assert "row 16: has no label (column 'label')" in with_row(label=None)
    assert "row 16: column 'image' holds no bytes" in with_row(image={"bytes": None, "path": "x"})
    again = with_row()
    assert "row 16: '0.png' is in " in again
    assert again.endswith(
        "already; leave one of them out, or number the images with --columns path="
    )
    argv = ["--dataset=parquet", f"--root={tmp_path / 'bad.parquet'}", "--columns", "path="]
    assert main([*argv, f"--out={tmp_path / 'numbered'}", "--jobs=1"]) == 0
    file.write_bytes(file.read_bytes()[:-40])
    assert told().startswith(f"65 {file}: cannot be read as parquet (")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert told().endswith("pip install 'moa-trainer[parquet]'")


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"k.png": b"", "k.jpg": b"", "k.cls": b"0"}, "sample 'k': holds 2 images (png, jpg); na"),
        ({"k.cls": b"0"}, "sample 'k': holds 0 images"),
        ({"k.png": b"", "k.json": b"{"}, "sample 'k': its .json cannot be read"),
        ({"k.png": b"", "k.cls": b"0"}, "none for the domain (domain); there are @file, cls, @"),
        ({"../k.png": b"", "../k.cls": b"0", "../k.domain": b"d"}, "'0/../k.png' is no plain path"),
        (None, "65 {}: cannot be read as a tar file (truncated header); unpack it"),
    ],
)
def test_samples_of_an_archive_that_cannot_be_taken_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, members: dict[str, bytes] | None, told: str
) -> None:
    file = write_tar(tmp_path / "root" / "set.tar", members or {})
    if members is None:
        file.write_bytes(b"\x1f\x8b no tar")
    said = refused(caplog, tmp_path, "webdataset", "--root", str(tmp_path / "root"))
    assert told.format(file) in said


def test_the_images_that_wait_are_counted_as_space_needed(
    whole: ShardIndex, paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    root = whole.root.parent / "images"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    for flags in (["--root", str(root)], lay_out("parquet", root, tmp_path / "root", paths)):
        dataset = "folder" if str(root) in flags else "parquet"
        assert main([f"--dataset={dataset}", *flags, f"--out={tmp_path / dataset}"]) == 73
    needed = [int(text.split(": ")[2].split()[0]) for text in caplog.messages if "needed" in text]
    images = [root / path for path in paths if not path.endswith("gif")]
    assert needed[1] - needed[0] == sum(path.stat().st_size for path in images)


def test_parquet_goes_on_where_it_was_interrupted(
    whole: ShardIndex, paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = lay_out("parquet", whole.root.parent / "images", tmp_path / "root", paths)
    argv = ["--dataset=parquet", *flags, "--shard_size=8", "--out"]
    calls = iter(range(99))

    def pack(*args: object, **options: object) -> shard_file.PackedShard:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return shard_file.pack_shard(*args, **options)  # type: ignore[arg-type]

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "pack_shard", pack)
        assert main([*argv, str(out), "--jobs=1"]) == 130
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(before) == 3
    assert not (out / ".writer.images").exists()
    (out / ".writer.images.01234567.partial").write_bytes(b"what kill -9 leaves")
    assert main([*argv, str(out), "--jobs=2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert main([*argv, str(tmp_path / "fresh"), "--jobs=1"]) == 0
    assert folder_bytes(out) == folder_bytes(tmp_path / "fresh")
