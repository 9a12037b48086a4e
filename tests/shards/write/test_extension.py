"""Sets that get further domains: the old ones stay, and a crash at any moment harms nothing."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from shards.config import DataConfig
from shards.opening import open_shards
from shards.read.index import ShardIndex
from shards.stream.evaluation import split_places
from shards.write.verify import verify_shards
from shards.writer import main, write_shards
from tests.support.shards_fixtures import FOLDER, folder_bytes, make_folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("extended") / "images"
    return make_folder(root, domains=("Art", "art", "clip", "photo"), per_class=5)


@pytest.fixture
def out(images: Path, tmp_path: Path) -> Path:
    """A set of two of the four domains."""
    for domain in ("art", "photo"):
        shutil.copytree(images / domain, tmp_path / "some" / domain)
    return write_shards(tmp_path / "some", tmp_path / "out", FOLDER, shard_size=4).root


def extend(images: Path, out: Path, *more: str) -> int:
    argv = ["--root", str(images), "--out", str(out), "--shard_size=4", "--jobs=1", "--quick"]
    return main([*argv, *more])


def splits(index: ShardIndex) -> dict[str, list[int]]:
    return {
        name: split_places(index, env, "out", trial_seed=3, holdout_fraction=0.2).tolist()
        for env, name in enumerate(index.domains)
    }


def test_a_domain_follows_the_old_ones(images: Path, out: Path) -> None:
    before, splits_before = folder_bytes(out), splits(ShardIndex.load(out))
    assert main(["--out", str(out), "--name", "mine"]) == 0
    assert extend(images, out, "--extend", "clip", "--verify", "--deep") == 0
    index = open_shards(DataConfig(dataset="folder", root=str(out)))
    assert (index.domains, index.name) == (("art", "photo", "clip"), "mine")
    assert splits(index).items() >= splits_before.items()
    after = folder_bytes(out)
    for name, content in before.items():
        assert (after[name] == content) == (name not in ("index.json", "_info.json"))
    assert sorted(after.keys() - before.keys()) == [
        ".writer.lock", *(f"folder-clip-00000{n}.tar" for n in range(3)), "folder-clip.npy",
    ][".writer.lock" in before :]  # fmt: skip
    source = sorted((images / "clip").rglob("*.*"))
    stored = [index.read(2, place).image for place in range(index.num_samples(2))]
    assert stored == [path.read_bytes() for path in source]
    assert extend(images, out, "--extend", "clip") == 0, "done already"
    assert folder_bytes(out) == after
    assert extend(images, out, "--extend", "Art") == 0
    index = ShardIndex.load(out)
    assert index.domains == ("art", "photo", "clip", "Art")
    assert index.domain_infos[3].key_prefix == "Art_env3", "some file systems ignore case"
    assert verify_shards(index, deep=True).problems == []
    assert main(["--root", str(out.parent / "some"), "--out", str(out), "--jobs=1"]) == 73


def test_two_at_once_are_as_one_after_the_other(images: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "twice")
    assert extend(images, out, "--extend", "clip", "Art") == 0
    left = tmp_path / "twice" / ".extension"
    left.mkdir()
    (left / ".writer.state").write_text("of an extension by another domain\n")
    (left / "folder-other-000000.tar").write_text("not finished")
    for name in ("clip", "Art"):
        assert extend(images, tmp_path / "twice", "--extend", name) == 0
    assert not left.exists()
    together, apart = folder_bytes(out), folder_bytes(tmp_path / "twice")
    assert together.keys() == apart.keys()
    assert {name for name in together if together[name] != apart[name]} <= {"index.json"}


def test_groups_go_on(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(images / "art", tmp_path / "some" / "art")
    pattern = r"im0*([0-9])\."
    out = write_shards(tmp_path / "some", tmp_path / "out", FOLDER, group_by=pattern).root
    assert extend(images, out, "--extend", "clip", "--group_by", "x") == 2
    assert "has 'im0*([0-9])\\\\.', which its new domains get too" in caplog.text
    assert extend(images, out, "--extend", "clip") == 0
    index = ShardIndex.load(out)
    assert index.group_by == pattern
    groups = [set(index.table(domain)["group"].tolist()) for domain in range(2)]
    assert groups[0] < groups[1], "of the same names"


def test_what_does_not_fit_is_refused(
    images: Path, out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = folder_bytes(out)
    other = make_folder(tmp_path / "other", domains=("new",), classes=("cat", "dogs"))
    less = make_folder(tmp_path / "less", domains=("new",), classes=("cat",))
    cases = [
        ((images, out, "--extend", "art"), 2, "--extend 'art': the set in"),
        ((images, out, "--extend", "clipp"), 2, "'clipp': not a domain of"),
        ((other, out, "--extend", "new"), 2, "has the extra class 'dogs' compared with the set"),
        ((less, out, "--extend", "new"), 2, "'new' lacks the class 'dog' compared with the set"),
        ((images, tmp_path / "none", "--extend", "clip"), 2, "does not exist; make a shard set"),
        (
            (images, out, "--extend", "clip", "--dataset", "pacs"),
            2,
            "only sets of --dataset folder",
        ),
    ]
    for (root, where, *more), code, said in cases:
        caplog.clear()
        assert extend(root, where, *more) == code, said
        (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert said in line
        assert "\n" not in line
    assert main(["--out", str(out), "--extend", "clip"]) == 2
    stray = out / "folder-clip-000001.tar"
    stray.write_bytes(b"mine")
    assert extend(images, out, "--extend", "clip") == 73
    assert stray.read_bytes() == b"mine"
    stray.unlink()
    after = folder_bytes(out)
    assert after.keys() - before.keys() <= {".writer.lock"}
    assert {**after, **before} == after


def killed_at(moment: int, images: Path, out: Path) -> int:
    """Extends in a process that is killed when it touches a file for the n-th time; how it ends."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen = [0]

    def watch(event: str, args: tuple[object, ...]) -> None:
        touches = event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if touches and str(out) in str(args[0]):
            seen[0] += 1
            if seen[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    os._exit(extend(images, out, "--extend", "clip"))


def test_killed_anywhere_the_set_is_whole(images: Path, out: Path, tmp_path: Path) -> None:
    old = ShardIndex.load(out)
    shutil.copytree(out, tmp_path / "undisturbed")
    assert extend(images, tmp_path / "undisturbed", "--extend", "clip") == 0
    new = folder_bytes(tmp_path / "undisturbed")
    states, moment, last = set(), 1, -signal.SIGKILL
    while last != 0:
        trial = tmp_path / f"trial{moment}"
        shutil.copytree(out, trial)
        last = killed_at(moment, images, trial)
        assert last in (0, -signal.SIGKILL)
        index = ShardIndex.load(trial)
        states.add(index.domains)
        if index.domains == old.domains:
            assert index.sha256 == old.sha256
        for env in range(len(index.domains)):
            images_there = [index.read(env, at).image for at in range(index.num_samples(env))]
            assert all(images_there)
        if moment % 2 == 0 or last == 0:
            assert extend(images, trial, "--extend", "clip") == 0
            assert {k: v for k, v in folder_bytes(trial).items() if k != ".writer.lock"} == {
                k: v for k, v in new.items() if k != ".writer.lock"
            }
        shutil.rmtree(trial)
        moment += 7
    assert states == {("art", "photo"), ("art", "photo", "clip")}
    assert moment > 80
