"""What an error at resuming advises works, and nothing is advised that would spoil a run."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moa import adapter_state_dict
from trainer.checkpoint import checkpoint
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.command_line import parse
from trainer.prepare.parts import Parts, build
from trainer.process.errors import CheckpointError, ConfigError, OutputError
from trainer.process.world import ALONE
from trainer.train.resume import Start, find_start, state_of

STEP = 3


@pytest.fixture(scope="module")
def parts(few: dict[str, str]) -> Parts:
    settings = ["--moa.method=linear", f"--data.root={few['data__root']}", f"--train.steps={STEP}"]
    return build(parse(settings), ALONE)


@dataclass
class Case:
    """A run in a folder, and the settings of another start there."""

    parts: Parts
    folder: Path

    def save(self) -> None:
        state = {"step": STEP, **state_of(self.parts)}
        tensors = adapter_state_dict(self.parts.model)
        checkpoint.save(self.folder / "checkpoints", self.parts.info, tensors, {}, state, keep=1)

    def start(self, folder: Path | None = None, **changes: Any) -> Start:
        """As with `section__field=value` on top of the settings."""
        config = self.parts.config
        for name, value in changes.items():
            section, _, field = name.rpartition("__")
            value = replace(getattr(config, section), **{field: value}) if section else value
            config = replace(config, **{section or field: value})
        run = RunFolder(folder or self.folder)
        return find_start(run, replace(self.parts, config=config))

    def with_classes(self, *classes: str) -> "Case":
        """With other names for the first classes, and so another index."""
        names = (*classes, *self.parts.info.classes[len(classes) :])
        stream: Any = SimpleNamespace(
            fingerprint=lambda: self.parts.stream.fingerprint() | {"index_sha256": "f" * 64}
        )
        info = replace(self.parts.info, classes=names)
        return Case(replace(self.parts, info=info, stream=stream), self.folder)


@pytest.fixture
def case(parts: Parts, tmp_path: Path) -> Case:
    found = Case(parts, tmp_path / "run")
    found.save()
    return found


def refused(call: Callable[[], object], kind: type[Exception], *advised: str) -> str:
    with pytest.raises(kind) as caught:
        call()
    for words in advised:
        assert words in str(caught.value)
    return str(caught.value)


def test_a_folder_that_holds_a_run(case: Case, tmp_path: Path) -> None:
    new = tmp_path / "new"
    refused(
        lambda: case.start(resume="never"), OutputError, "another --output_dir", "--resume auto"
    )
    assert case.start(new, resume="never") == Start()
    assert case.start(resume="auto").step == STEP
    refused(lambda: case.start(new, resume="must"), ConfigError, "--output_dir", "--resume auto")
    assert case.start(resume="must").step == STEP
    assert case.start(new, resume="auto") == Start()


def test_fewer_steps_than_were_done(case: Case, tmp_path: Path) -> None:
    refused(
        lambda: case.start(train__steps=STEP - 1), ConfigError, f"give {STEP} or more",
        "another --output_dir",
    )  # fmt: skip
    assert case.start(train__steps=STEP).step == STEP
    assert case.start(tmp_path / "new", train__steps=STEP - 1) == Start()


def test_checkpoints_that_are_gone_or_damaged(case: Case, tmp_path: Path) -> None:
    (kept,) = (case.folder / "checkpoints").glob("step-*")
    moved = kept.rename(tmp_path / kept.name)
    done = case.folder / "done"
    done.touch()
    refused(case.start, OutputError, "another --output_dir", "remove that folder")
    assert case.start(tmp_path / "new") == Start()
    done.unlink()
    assert case.start() == Start()
    moved.rename(kept)
    weights = kept / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"")
    refused(case.start, CheckpointError, "restore one from a copy", "another --output_dir")
    assert case.start(tmp_path / "new") == Start()
    weights.write_bytes(whole)
    assert case.start().step == STEP


@pytest.mark.parametrize(
    ("setting", "value"), [("optim__lr", 0.5), ("train__seed", 4), ("data__decode", "pil")]
)
def test_a_changed_setting(setting: str, value: object, case: Case, tmp_path: Path) -> None:
    told = refused(lambda: case.start(**{setting: value}), ConfigError, "keep the old value")
    assert case.start().changes == []
    assert case.start(tmp_path / "new", **{setting: value}) == Start()
    assert follows(told, case, **{setting: value}).changes[0]["new"] == value


def follows(told: str, case: Case, **changes: Any) -> Start:
    """The start with the flag that a message offers."""
    (flag,) = re.findall(r"--checkpoint.allow_changes='[^']*'", told)
    allowed = parse([flag.replace("'", "")]).checkpoint.allow_changes
    return case.start(**changes, checkpoint__allow_changes=allowed)


def test_other_images_may_be_allowed_other_classes_never(case: Case, tmp_path: Path) -> None:
    told = refused(case.with_classes().start, ConfigError, "index_sha256")
    (change,) = follows(told, case.with_classes()).changes
    assert change["setting"] == "data (index_sha256)"
    first, second = case.parts.info.classes[:2]
    for classes in ((second, first), ("hound",), (first, "hound")):
        for allowed in ((), ("data",), ("data", "optim.lr")):
            other, flags = case.with_classes(*classes), {"checkpoint__allow_changes": allowed}
            told = refused(
                lambda other=other, flags=flags: other.start(**flags), ConfigError,
                "classes: the run in", "another --output_dir",
            )  # fmt: skip
            assert "allow_changes" not in told
            assert other.start(tmp_path / "new", **flags) == Start()
    with pytest.raises(ConfigError, match="'classes' is no setting"):
        parse(["--checkpoint.allow_changes=[classes]"])
    told = refused(lambda: case.with_classes("hound").start(optim__lr=0.5), ConfigError, "optim.lr")
    assert "classes: the run" in told
