"""The layout that design and readers rely on."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("moa", "shards", "trainer")
FORBIDDEN = {"moa": {"trainer", "shards"}, "shards": {"trainer", "moa"}, "trainer": set()}
MAY_IMPORT = {
    "deepspeed": {
        "trainer/engine/engine.py",
        "trainer/engine/collectives.py",
        "trainer/engine/zero_check.py",
        "trainer/engine/zero_state.py",
        "moa/parallel/expert_parallel.py",
    },
    "torch.distributed": {
        "trainer/engine/engine.py",
        "trainer/engine/collectives.py",
        "trainer/engine/zero_state.py",
        "moa/parallel/expert_parallel.py",
        "moa/parallel/exchange.py",
    },
}
COMMANDS = (
    ["trainer/run.py"],
    ["-m", "trainer.evaluate"],
    ["-m", "trainer.export"],
    ["-m", "trainer.flatness"],
    ["-m", "trainer.plan"],
    ["-m", "trainer.report"],
    ["-m", "trainer.sweep"],
    ["-m", "trainer.sweep.slurm_array"],
    ["-m", "trainer.bench"],
    ["-m", "shards.writer"],
)


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).glob("**/*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_packages_do_not_reach_where_they_must_not() -> None:
    for path, tree in sources():
        for name in imported(tree):
            assert name.split(".")[0] not in FORBIDDEN[path.parts[0]], f"{path} imports {name}"


def test_engine_libraries_stay_in_their_files() -> None:
    for path, tree in sources():
        for library, files in MAY_IMPORT.items():
            if any(name == library or name.startswith(library + ".") for name in imported(tree)):
                assert path.as_posix() in files, f"{path} imports {library}"


def test_files_are_short_and_hide_no_standard_module() -> None:
    for path, _ in sources():
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        assert lines <= 300, f"{path} has {lines} lines"
        assert path.stem not in sys.stdlib_module_names, path


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[-1])
def test_help_does_not_wait_for_torch(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "argparse" in loaded
    assert not loaded & {"torch", "deepspeed", "timm", "torchvision"}


def test_shipped_files_are_small() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            assert (ROOT / name).stat().st_size <= 6 * 2**20, name
