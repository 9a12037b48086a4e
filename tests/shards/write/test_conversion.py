import dataclasses
import functools
import io
import logging
import multiprocessing
import os
import tarfile
from pathlib import Path

import filelock
import numpy as np
import pytest

from shards.errors import DamagedDataError, DataConfigError, OutputError
from shards.read.layout import key_prefixes
from shards.write import conversion, image_folder as listing_module, shard_file, shard_plan
from shards.write.verify import verify_shards
from shards.write.worker_pool import run_tasks
from shards.writer import write_shards
from tests.support.shards_fixtures import FOLDER, folder_bytes, image_bytes, make_folder


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
    assert "already holds this set (same names and sizes; move it away if images" in caplog.text
    assert folder_bytes(tmp_path / "out") == before


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


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    root, out = make_folder(tmp_path / "images"), tmp_path / "out"
    for name in ("shard_size", "shard_bytes", "jobs"):
        with pytest.raises(DataConfigError, match=f"--{name} 0: must be 1 or more"):
            write_shards(root, out, FOLDER, **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(DataConfigError, match="must not lie inside --root"):
        write_shards(root, root / "art" / "shards", FOLDER)
    assert not out.exists()


@pytest.mark.parametrize("limit", [1, 12_000, 24_000, 10**9])
def test_shards_are_as_full_as_both_limits_allow(tmp_path: Path, limit: int) -> None:
    root = make_folder(tmp_path / "images", per_class=12)
    index = write_shards(root, tmp_path / "out", FOLDER, shard_size=9, shard_bytes=limit)
    assert verify_shards(index, deep=False).problems == []
    room = 20 * 512  # tar pads a file to full records
    for env, domain in enumerate(index.domains):
        mine = [shard for shard in index.shards if shard.file.startswith(f"folder-{domain}-")]
        assert sum(shard.samples for shard in mine) == index.num_samples(env)
        for shard in mine:
            assert shard.samples == 1 or shard.bytes <= limit + room
            assert shard.samples <= 9
        full = {1: 1, 10**9: 9}.get(limit)
        if full:
            assert {shard.samples for shard in mine[:-1]} == {full}
        else:
            assert 1 < max(shard.samples for shard in mine) < 9


def test_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    (root / "art/cat/im001.jpg").write_bytes(b"")
    write_shards(root, tmp_path / "one", FOLDER, shard_size=4)
    write_shards(root, tmp_path / "three", FOLDER, shard_size=4, jobs=3)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "three")


def test_image_that_changes_meanwhile_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "images")

    def plan_then_change(*args: object) -> shard_plan.ShardPlan:
        plan = shard_plan.make_plan(*args)  # type: ignore[arg-type]
        (root / "photo/dog/im001.jpg").write_bytes(b"shorter")
        return plan

    monkeypatch.setattr(conversion, "make_plan", plan_then_change)
    with pytest.raises(DamagedDataError, match=r"im001.jpg: has 7 bytes, had \d+ when listed"):
        write_shards(root, tmp_path / "out", FOLDER)


@pytest.mark.parametrize("jobs", [1, 2])
def test_unreadable_image_is_named_when_packing(tmp_path: Path, jobs: int) -> None:
    root = make_folder(tmp_path / "images")
    path = root / "photo/dog/im001.jpg"
    size = path.stat().st_size
    path.unlink()
    path.mkdir()  # to be listed as a file, below
    listing = listing_module.list_images(root, FOLDER)
    domain = listing.domains[1]
    assert "dog/im001.jpg" not in domain.paths
    plan = shard_plan.make_plan(listing, "folder", 5, 10**9)
    task = next(task for task in plan.tasks if task.domain_name == "photo")
    broken = dataclasses.replace(
        task, paths=("dog/im001.jpg", *task.paths[1:]), sizes=np.array([size, *task.sizes[1:]])
    )
    (tmp_path / "out").mkdir()
    pack = functools.partial(shard_file.pack_shard, out=tmp_path / "out")
    with pytest.raises(DamagedDataError, match=r"im001.jpg: cannot be read \(Is a directory"):
        list(run_tasks(pack, [broken] * 3, jobs))
    assert multiprocessing.active_children() == []
    assert list((tmp_path / "out").iterdir()) == []


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    (root / "art/cat/im001.jpg").unlink()
    (root / "art/cat/im001.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(DamagedDataError, match=r"im001.jpg: cannot be read \(No such file"):
        write_shards(root, tmp_path / "out", FOLDER)
    (root / "art/cat/im001.jpg").unlink()
    os.mkfifo(root / "art/cat/._im001.jpg")  # would be waited for
    with pytest.raises(DamagedDataError, match=r"im001.jpg: cannot be read \(no plain file"):
        write_shards(root, tmp_path / "out", FOLDER)


def test_image_bytes_fixture_is_deterministic() -> None:
    assert image_bytes(3) == image_bytes(3)
    assert io.BytesIO(image_bytes(3, "JPEG")).read(2) == b"\xff\xd8"
