"""What make removes, what it must not leave behind, and that `make test-gpu` would begin."""

import ast
import os
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from tests.support.trainer_fixtures import ROOT
from trainer.bench.__main__ import parser

HALF_WAY = """#!/bin/sh
if [ "$2" = venv ]; then mkdir -p "$3/bin" && touch "$3/bin/python" && exit 1; fi
"""


def make(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs the Makefile on what is in `folder`."""
    return subprocess.run(
        ["make", f"--file={ROOT / 'Makefile'}", *arguments],
        cwd=folder, capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "MAKEFLAGS"},  # of a make around the tests
    )  # fmt: skip


def test_an_environment_that_failed_half_way_is_made_anew(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(HALF_WAY)
    python.chmod(0o755)
    for _ in range(2):
        result = make(tmp_path, ".venv/bin/python", f"PYTHON={python}")
        assert result.returncode != 0
        assert "-m venv" in result.stdout
        assert not (tmp_path / ".venv").exists()


def test_clean_keeps_the_results(tmp_path: Path) -> None:
    for name in (".venv", "build", "moa.egg-info", "outputs"):
        (tmp_path / name).mkdir()
    assert make(tmp_path, "clean").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_a_report_is_made_although_checks_fail(tmp_path: Path) -> None:
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(f'#!/bin/sh\necho "$*" >>{calls}\ncase "$*" in *pytest*) exit 3; esac\n')
    python.chmod(0o755)
    result = make(tmp_path, "gpu-report", f"BIN={tmp_path}", "--old-file=.venv/.installed-test")
    assert "Error 3" in result.stderr
    checks, report = calls.read_text().splitlines()
    assert checks == "-m pytest tests/gpu_checks.py"
    *_, flags = report.partition("-m trainer.bench ")
    given = parser().parse_args(flags.split())
    assert (given.part, given.device) == (["report"], "cuda")
    assert (tmp_path / given.json).parent.is_dir()


def test_gpu_checks_are_the_documented_ones() -> None:
    """Each begins with the sentence of docs/gpus.md that it proves."""
    tree = ast.parse((ROOT / "tests" / "gpu_checks.py").read_text(encoding="utf-8"))
    checks = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[:5] == "test_"]
    sentences = [(ast.get_docstring(check) or "").partition("\n")[0] for check in checks]
    page = (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8")
    table = page.split("| sentence | passed |")[1].split("\n\n")[0]
    assert sentences == [line.split(" | ")[0][2:] for line in table.splitlines()[2:]]


def test_gpu_checks_stop_at_the_missing_gpu_and_nothing_else() -> None:
    with pytest.raises(AssertionError, match="no GPU"):  # `make test` hides those there are
        import_module("tests.gpu_checks")
