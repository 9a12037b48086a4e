"""Checkpoints under kills and damage: small tensors, no engine."""

import errno
import hashlib
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from moa.errors import AdapterError
from moa.files.atomic_folder import recover_folder
from moa.files.reading import read_adapter
from shards.errors import StorageError
from tests.support.checkpoint_fixtures import (
    INFO,
    fresh_copy,
    killed_at,
    points_of,
    tag_of,
    tensors,
    two_checkpoints,
    write,
)
from trainer.checkpoint import checkpoint
from trainer.checkpoint.checkpoint import UnknownFormatError, clean_up, load, load_newest, verify
from trainer.process.errors import CheckpointError, exit_code
from trainer.train.best import Best, Candidate, restored_best, write_best

FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "best_model.safetensors",
    "manifest.json", "optimizer.safetensors", "state.json",
}  # fmt: skip


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A root with checkpoints of steps 1 and 2, tagged alike."""
    return two_checkpoints(tmp_path / "two")


def test_a_checkpoint_comes_back_as_it_was_written(two: Path) -> None:
    assert {path.name for path in (two / "step-00000002").iterdir()} == FILES
    found = load_newest(two)
    assert found is not None
    assert (found.state["step"], tag_of(found)) == (2, 2.0)
    assert (two / "latest").read_text() == "step-00000002\n"
    written = json.loads((two / "step-00000002" / "manifest.json").read_text())
    for name in FILES - {"manifest.json"}:
        content = (two / "step-00000002" / name).read_bytes()
        assert written[name]["sha256"] == hashlib.sha256(content).hexdigest()


NAMED_POINTS = (
    "before mkdir step-00000003.tmp", "amid write adapter_model.safetensors",
    "after write optimizer.safetensors", "amid write best_model.safetensors",
    "amid write state.json", "before fsync state.json", "before write manifest.json",
    "amid write manifest.json", "before fsync manifest.json", "after fsync step-00000003.tmp",
    "before rename step-00000003.tmp", "after rename step-00000003.tmp", "after fsync root",
    "amid write latest.tmp", "before replace latest.tmp", "after replace latest.tmp",
    "after rename step-00000001", "after unlink state.json", "before rmdir step-00000001.tmp",
)  # fmt: skip


def test_kill_at_every_point_of_a_save(two: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"

    def save() -> None:
        write(root, 3, tag=3)

    fresh_copy(two, root)
    names = points_of(save, tmp_path / "names")
    assert set(NAMED_POINTS) <= set(names)
    placed = names.index("after rename step-00000003.tmp")
    assert names.index("before fsync manifest.json") < placed
    assert names.index("before rename step-00000001") > names.index("after replace latest.tmp")
    for number, name in enumerate(names):
        fresh_copy(two, root)
        killed_at(number, save)
        pointed = root / (root / "latest").read_text().strip()
        verify(pointed)
        clean_up(root)
        found = load_newest(root)
        assert found is not None, name
        assert tag_of(found) == found.state["step"] == (3 if number >= placed else 2), name
        assert all(path.suffix == "" for path in root.iterdir()), name
        save()
        assert tag_of(load(root / "step-00000003")) == 3


def test_kill_at_every_point_of_a_save_of_the_same_step(two: Path, tmp_path: Path) -> None:
    """As after a stop right after a resume; the folder is replaced by one of the same name."""
    root = tmp_path / "root"

    def save() -> None:
        write(root, 2, tag=22)

    fresh_copy(two, root)
    names = points_of(save, tmp_path / "names")
    placed = names.index("after rename step-00000002.tmp")
    assert "after rename step-00000002" in names[:placed], "moved aside, not deleted"
    for number, name in enumerate(names):
        fresh_copy(two, root)
        killed_at(number, save)
        clean_up(root)
        found = load_newest(root)
        assert found is not None, name
        assert found.state["step"] == 2, name
        assert tag_of(found) == (22 if number >= placed else 2), name
        assert {p.name for p in root.iterdir()} == {"step-00000001", "step-00000002", "latest"}


def test_kill_at_every_point_of_a_new_best_adapter(tmp_path: Path) -> None:
    folder, old = tmp_path / "adapter", tmp_path / "old"
    write_best(old, INFO, Best(Candidate(0, 0.5, {"step": 0}, tensors(1))))

    def replace() -> None:
        write_best(folder, INFO, Best(Candidate(6, 0.6, {"step": 6}, tensors(2))))

    fresh_copy(old, folder)
    for number in range(len(points_of(replace, tmp_path / "names"))):
        fresh_copy(old, folder)
        killed_at(number, replace)
        recover_folder(folder)
        info, found = read_adapter(folder)
        step = info.results["step"]
        assert found["head.bias"].tolist() == [{0: 1.0, 6: 2.0}[int(step)]] * 3
        assert {path.name for path in tmp_path.glob("adapter*")} == {"adapter"}


def cut(share: float, less: int) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * share) - less]


def flip(content: bytes) -> bytes:
    place = random.Random(len(content)).randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES = {"empty": cut(0, 0), "half": cut(0.5, 0), "one byte less": cut(1, 1), "flip": flip}


@pytest.mark.parametrize("name", sorted(FILES))
def test_damage_is_found_and_the_checkpoint_before_is_taken(
    name: str, two: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = two / "step-00000002" / name
    whole = path.read_bytes()
    for kind, damage in [*DAMAGES.items(), ("missing", None)]:
        path.unlink(missing_ok=True)
        if damage is not None:
            path.write_bytes(damage(whole))
        with pytest.raises(CheckpointError, match="step-00000002") as caught:
            load(path.parent)
        assert exit_code(caught.value) == 65
        caplog.clear()
        found = load_newest(two)
        assert found is not None
        assert tag_of(found) == found.state["step"] == 1, kind
        assert "skipping a damaged checkpoint" in caplog.text
        assert "step-00000002" in caplog.text
    path.write_bytes(whole)
    assert load_newest(two) is not None
    verify(path.parent)


class Flaky:
    """`Path.open` that fails with `error` the first `times` that a file of `name` is opened."""

    def __init__(self, name: str, error: int, times: int) -> None:
        self.name, self.error, self.left, self.real = name, error, times, Path.open

    def __call__(self, path: Path, *args: Any, **options: Any) -> Any:
        if path.name == self.name and self.left:
            self.left -= 1
            raise OSError(self.error, os.strerror(self.error), str(path))
        return self.real(path, *args, **options)


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("name", ["manifest.json", "optimizer.safetensors"])
def test_a_storage_that_fails_does_not_make_a_checkpoint_damaged(
    error: int, name: str, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(times: int) -> None:
        flaky = Flaky(name, error, times)
        monkeypatch.setattr(Path, "open", lambda *args, **options: flaky(*args, **options))

    failing(1)
    found = load_newest(two)
    assert found is not None
    assert found.state["step"] == 2, "tried once more"
    failing(2)
    with pytest.raises(StorageError, match=r"step-00000002: cannot be read now .*start again") as e:
        load_newest(two)
    assert exit_code(e.value) == 1
    assert os.strerror(error) in str(e.value)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for function in ("listdir", "scandir"):
        monkeypatch.setattr(os, function, refused)
    with pytest.raises(StorageError, match=r"two: cannot be read now .Permission denied"):
        load_newest(two)


def test_no_flipped_bit_of_the_manifest_passes(two: Path) -> None:
    path = two / "step-00000002" / "manifest.json"
    whole, draw = path.read_bytes(), random.Random(0)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            verify(path.parent)


def test_none_whole_is_an_error_not_a_new_start(two: Path) -> None:
    for folder in two.glob("step-*"):
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is whole"):
        load_newest(two)
    assert load_newest(two / "elsewhere") is None


def test_a_damaged_checkpoint_given_by_name_ends_with_65(
    two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.evaluate.__main__ import main

    (two / "step-00000002" / "README.md").write_text("another card")
    assert main(["--adapter", str(two / "step-00000002")]) == 65
    told = capsys.readouterr().err
    assert re.search(
        r"README.md: not as it was written \({'bytes': 12, 'sha256': '\w{12}'}, ", told
    )


def test_a_checkpoint_of_another_release_is_not_passed_over(two: Path) -> None:
    folder = two / "step-00000002"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format_version": 99}))
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / "state.json").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    manifest["state.json"] = {"bytes": len(content), "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    with pytest.raises(UnknownFormatError, match=r"format_version 99.*reads 2"):
        load_newest(two)


def test_the_newest_goes_by_the_step_not_by_the_clock(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 7):
        write(tmp_path, step, tag=1, keep=3)
    for number, folder in enumerate(sorted(tmp_path.glob("step-*"))):
        os.utime(folder, (10**9 - number, 10**9 - number))
    os.utime(tmp_path / "step-00000007", (2 * 10**9, 2 * 10**9))
    found = load_newest(tmp_path)
    assert found is not None
    assert found.state["step"] == 100_000_000
    write(tmp_path, 100_000_001, tag=1, keep=2)
    assert {checkpoint._step(p) for p in tmp_path.glob("step-*")} == {100_000_000, 100_000_001}


def candidate(step: int, validation: float) -> Candidate:
    return Candidate(step, validation, {"step": step}, tensors(step))


def saved(root: Path, best: Best, step: int) -> checkpoint.Checkpoint:
    """A checkpoint whose own tensors tell step - 1, the step that was evaluated last."""
    own = tensors(step - 1)
    state = {"step": step, **best.state()}
    return load(checkpoint.save(root, INFO, own, own, state, 9, best.tensors_beside(step)))


def value_of(best: Best) -> float | None:
    return None if best.current is None else float(best.current.tensors["head.bias"][0])


def test_the_best_adapter_travels_in_the_checkpoint(tmp_path: Path) -> None:
    best = Best()
    assert value_of(restored_best(saved(tmp_path, best, 1), 99, 6)) is None
    best.put(candidate(6, 0.5), eval_every=6)
    assert not best.is_beaten_by(0.5), "the first of equals stays"
    assert best.is_beaten_by(0.6)
    at_7, at_9 = saved(tmp_path, best, 7), saved(tmp_path, best, 9)
    assert at_7.best is None, "the checkpoint's own tensors are the best"
    assert at_9.best is not None
    for found in (at_7, at_9):
        again = restored_best(found, 99, 6)
        assert again.state() == best.state()
        assert value_of(again) == 6


def test_a_longer_run_forgets_the_closing_evaluation(tmp_path: Path) -> None:
    best = Best()
    best.put(candidate(6, 0.5), eval_every=6)
    best.put(candidate(9, 0.7), eval_every=6)
    found = saved(tmp_path, best, 10)
    assert value_of(restored_best(found, steps=10, eval_every=6)) == 9, "the same run"
    assert value_of(restored_best(found, steps=13, eval_every=6)) == 6, "a longer one"
    write_best(tmp_path / "adapter", INFO, restored_best(found, 13, 6))
    assert read_adapter(tmp_path / "adapter")[0].results == {"step": 6}
    write_best(tmp_path / "adapter", INFO, Best())
    with pytest.raises(AdapterError):
        read_adapter(tmp_path / "adapter")


def test_a_schedule_changed_so_that_the_closing_evaluation_is_a_regular_one(tmp_path: Path) -> None:
    """Its tensors are then those of a later checkpoint as well, not that checkpoint's own."""
    best = Best()
    best.put(candidate(6, 0.5), eval_every=6)
    best.put(candidate(9, 0.7), eval_every=6)
    again = restored_best(saved(tmp_path, best, 10), steps=99, eval_every=3)
    assert value_of(again) == 9
    later = restored_best(saved(tmp_path, again, 15), steps=99, eval_every=3)
    assert value_of(later) == 9
