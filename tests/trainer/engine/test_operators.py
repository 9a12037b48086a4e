"""Where compiled operators are kept, and what is said before one is compiled."""

import logging
import os
import sys
from pathlib import Path

import pytest

from trainer.engine import collectives
from trainer.process.errors import OutputError


def prepared(monkeypatch: pytest.MonkeyPatch, cpu: bool = True) -> Path:
    monkeypatch.delenv(collectives.OPERATORS, raising=False)
    collectives.prepare_operators(cpu)
    return Path(os.environ[collectives.OPERATORS])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "PATH", collectives.OPERATORS):  # as they are, afterwards
        monkeypatch.setenv(name, str(tmp_path))


def test_each_environment_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(monkeypatch)
    assert prepared(monkeypatch) == first
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert prepared(monkeypatch) not in (first, first.parent)


def test_what_the_user_set_stays(tmp_path: Path) -> None:
    collectives.prepare_operators(cpu=True)
    assert os.environ[collectives.OPERATORS] == str(tmp_path)


def test_compiling_is_announced_until_it_is_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trainer")
    prepared(monkeypatch, cpu=False)
    assert "compiling" not in caplog.text
    folder = prepared(monkeypatch)
    assert caplog.text.count("compiling") == 1
    (folder / collectives.ON_CPU).mkdir(parents=True)
    (folder / collectives.ON_CPU / "operator.so").touch()
    prepared(monkeypatch)
    assert caplog.text.count("compiling") == 1


def test_a_home_that_cannot_be_written_is_told_with_the_variable_that_moves_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    told = r"TORCH_EXTENSIONS_DIR: .*/file/home/.* cannot be written \(Not a dir.*set TORCH_EXT"
    with pytest.raises(OutputError, match=told):
        prepared(monkeypatch)
    prepared(monkeypatch, cpu=False)  # nothing is compiled for GPUs
    monkeypatch.setenv(collectives.OPERATORS, str(tmp_path / "operators"))
    collectives.prepare_operators(cpu=True)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as of a user without an entry
    with pytest.raises(OutputError, match="HOME names no folder"):
        prepared(monkeypatch)
