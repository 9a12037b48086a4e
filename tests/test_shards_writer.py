import io
import json
import logging
import os
import tarfile
from pathlib import Path

import filelock
import pytest
import webdataset
from shards_fixtures import FOLDER, folder_bytes, image_bytes, make_folder
from torchvision.datasets import ImageFolder

from shards.datasets import DatasetSpec
from shards.errors import DamagedDataError, DataConfigError, OutputError
from shards.index import ShardIndex
from shards.layout import key_prefixes
from shards.listing import list_images
from shards.packing import ShardPacker
from shards.writer import write_shards


def awkward_folder(root: Path) -> Path:
    """Names that trip careless listings: case, dots, unicode, spaces, nesting, stray files."""
    names = [
        "b.JPG",
        "a.v2.jpeg",
        "A.png",
        "_z.webp",
        "ünïcode 1.PNG",
        "x y.TIF",
        "10.bmp",
        "9.bmp",
    ]
    kinds = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}
    for domain in ("Real World", "real.world", "zürich"):
        for class_name in ("B c", "a.b", "Ä"):
            folder = root / domain / class_name
            for place, name in enumerate((*names, "deep/er/k.png", "deep.er/k.png", "Deep/k.jpg")):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                suffix = name.rpartition(".")[2].lower()
                seed = hash_of(domain, class_name, place)
                path.write_bytes(image_bytes(seed, kinds.get(suffix, suffix.upper())))
            (folder / "notes.txt").write_text("not an image")
            (folder / "jpg").write_text("no extension")
            (folder / ".png.swp").write_text("swap file")
        (root / domain / "stray.jpg").write_bytes(image_bytes(1, "JPEG"))
    (root / "README.md").write_text("a file beside the domains")
    return root


def hash_of(*parts: object) -> int:
    return sum(ord(letter) * (place + 1) for place, letter in enumerate("|".join(map(str, parts))))


def test_listing_equals_imagefolder(tmp_path: Path) -> None:
    listing = list_images(awkward_folder(tmp_path), FOLDER)
    names = sorted(entry.name for entry in os.scandir(tmp_path) if entry.is_dir())
    assert [domain.name for domain in listing.domains] == names
    for domain in listing.domains:
        reference = ImageFolder(str(tmp_path / domain.name))
        assert list(listing.classes) == reference.classes
        ours = [str(tmp_path / domain.name / path) for path in domain.paths]
        assert list(zip(ours, domain.labels, strict=True)) == reference.samples


def test_stock_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    root = awkward_folder(tmp_path / "images")
    index = write_shards(root, tmp_path / "out", FOLDER, shard_size=7)
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    assert len(urls) == len(index.shards) == 3 * 5
    found: dict[str, dict[int, dict[str, object]]] = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        about = json.loads(sample["json"])
        image = [sample[name] for name in sample if name not in ("cls", "json") and name[0] != "_"]
        assert len(image) == 1
        found.setdefault(about["domain"], {})[about["index"]] = {
            "image": image[0],
            "label": int(sample["cls"]),
            "path": about["path"],
            "class_name": about["class_name"],
            "key": sample["__key__"],
        }
    for env, domain in enumerate(index.domains):
        reference = ImageFolder(str(root / domain))
        assert sorted(found[domain]) == list(range(index.num_samples(env)))
        for rank, (path, label) in enumerate(reference.samples):
            sample = found[domain][rank]
            assert sample["image"] == Path(path).read_bytes()
            assert root / str(sample["path"]) == Path(path)
            assert sample["label"] == label
            assert sample["class_name"] == reference.classes[label]
            assert index.read(env, rank) == (sample["key"], sample["image"], label)
    assert index.verify(deep=True) == []


def test_same_images_give_same_bytes(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    write_shards(root, tmp_path / "a", FOLDER, shard_size=8)
    for path in root.rglob("*"):
        os.utime(path, (1, 1))
    write_shards(root, tmp_path / "b", FOLDER, shard_size=8)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_shards_are_shuffled(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", per_class=40)
    write_shards(root, tmp_path / "out", FOLDER, shard_size=40)
    with tarfile.open(tmp_path / "out" / "folder-art-000000.tar") as archive:
        labels = [archive.extractfile(m).read() for m in archive if m.name.endswith(".cls")]  # type: ignore[union-attr]
    assert 10 < labels.count(b"0") < 30


def test_prefixes_are_distinct_and_plain() -> None:
    names = ["Real World", "Real_World", "real_world", "é", "è", "x" * 200, "x" * 201]
    prefixes = key_prefixes(names)
    assert len({prefix.lower() for prefix in prefixes}) == len(names)
    assert all(prefix.isascii() and "." not in prefix and len(prefix) < 60 for prefix in prefixes)


def test_second_run_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path / "images")
    write_shards(root, tmp_path / "out", FOLDER)
    before = folder_bytes(tmp_path / "out")
    with caplog.at_level(logging.INFO):
        write_shards(root, tmp_path / "out", FOLDER)
    assert "already holds this set" in caplog.text
    assert folder_bytes(tmp_path / "out") == before


def test_interrupted_conversion_is_finished_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "images")
    whole = write_shards(root, tmp_path / "whole", FOLDER, shard_size=8)
    plain = ShardPacker._sample
    for stop_at in (0, 7, 30, 50):
        calls = iter(range(1000))

        def sample(self: ShardPacker, *args: object, calls=calls, stop_at=stop_at) -> object:
            if next(calls) == stop_at:
                raise KeyboardInterrupt
            return plain(self, *args)  # type: ignore[arg-type]

        out = tmp_path / f"out{stop_at}"
        with monkeypatch.context() as patch:
            patch.setattr(ShardPacker, "_sample", sample)
            with pytest.raises(KeyboardInterrupt):
                write_shards(root, out, FOLDER, shard_size=5)
        (out / "folder-art-000099.tar.partial").write_bytes(b"what kill -9 leaves")
        with pytest.raises(DataConfigError, match=r"no index.json; make a shard set with `python"):
            ShardIndex.load(out)
        write_shards(root, out, FOLDER, shard_size=8)
        assert folder_bytes(out) == folder_bytes(whole.root)


def test_refuses_what_is_not_a_dataset(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refused(root: Path, match: str, spec: DatasetSpec = FOLDER, **options: object) -> None:
        with pytest.raises(DataConfigError, match=match):
            write_shards(root, out, spec, **options)  # type: ignore[arg-type]
        assert not out.exists()

    refused(tmp_path / "none", "--root .*none: no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no folder")
    good = make_folder(tmp_path / "good")
    refused(good, "--shard-size 0: must be 1 or more", shard_size=0)
    with pytest.raises(DataConfigError, match="must not lie inside"):
        write_shards(good, good / "shards", FOLDER)
    fixed = DatasetSpec(
        name="pacs", domains=("art", "cartoon"), num_classes=7, horizontal_flip=True
    )
    refused(good, "'cartoon' is missing; dataset pacs has", fixed)
    three = DatasetSpec(name="x", domains=None, num_classes=3, horizontal_flip=True)
    refused(good, "2 classes found, dataset x has 3", three)

    extra = make_folder(tmp_path / "extra")
    (extra / "photo" / "cow").mkdir()
    refused(extra, "'photo' has the extra class 'cow' compared with domain 'art'")
    lacking = make_folder(tmp_path / "lacking")
    (lacking / "sketch" / "dog").rename(lacking / "dog")
    refused(lacking, "'dog' holds no class folder|'sketch' lacks|'dog' lacks")
    hollow = make_folder(tmp_path / "hollow")
    for path in (hollow / "photo" / "dog").iterdir():
        path.rename(path.with_suffix(".txt"))
    refused(hollow, "class 'dog' of domain 'photo' holds no image")
    stray = make_folder(tmp_path / "stray")
    (stray / "annotations").mkdir()
    refused(stray, "domain 'annotations' holds no class folder|lacks")


def test_refuses_an_output_folder_with_other_content(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("mine.npy", "features-000001.tar", "thesis.tex"):
        (out / name).write_text("precious")
        with pytest.raises(OutputError, match=f"not empty, it holds '{name}'"):
            write_shards(root, out, FOLDER)
        assert (out / name).read_text() == "precious"
        (out / name).unlink()
    write_shards(root, out, FOLDER)
    (root / "art/cat/im000.png").unlink()
    with pytest.raises(OutputError, match="holds another shard set"):
        write_shards(root, out, FOLDER)


def test_refuses_while_another_writer_works(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out" / ".writer.lock"):
        with pytest.raises(OutputError, match="another writer is at work"):
            write_shards(root, tmp_path / "out", FOLDER)


def test_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "images")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\)"):
        write_shards(root, tmp_path / "out", FOLDER)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".writer.lock"]


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    (root / "art/cat/im001.jpg").unlink()
    (root / "art/cat/im001.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(DamagedDataError, match=r"im001.jpg: cannot be read \(No such file"):
        write_shards(root, tmp_path / "out", FOLDER)


def test_image_bytes_fixture_is_deterministic() -> None:
    assert image_bytes(3) == image_bytes(3)
    assert io.BytesIO(image_bytes(3, "JPEG")).read(2) == b"\xff\xd8"
