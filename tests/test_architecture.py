"""The layout that design and readers rely on: rooms, their order, and what may stand in them."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = {
    "moa": "files > model, parallel > layers > config > blocks > errors",
    "shards": "writer, preview > opening, command_line > embedded > write, stream > read, pixels > "
    "config > datasets > addresses, randomness, durable, errors",
    "trainer": "run > bench > train > monitor, report, export, flatness, predict, doctor > sweep > "
    "evaluate > pretrain_embedded, plan, engine > prepare, checkpoint > objectives > config > "
    "process",
}
"""Folders and files of each package: an import goes from the left of a `>` to its right only."""

FORBIDDEN = {"moa": {"trainer", "shards"}, "shards": {"trainer", "moa"}, "trainer": set()}
MAY_IMPORT = {
    "deepspeed": {
        "trainer/engine/collectives.py",
        "trainer/engine/engine.py",
        "trainer/engine/parameter_groups.py",
        "trainer/prepare/libraries.py",
        "trainer/prepare/zero_check.py",
        "trainer/engine/zero_state.py",
        "moa/parallel/expert_parallel.py",
    },
    "torch.distributed": {
        "trainer/engine/collectives.py",
        "trainer/engine/engine.py",
        "trainer/engine/rendezvous.py",
        "trainer/engine/zero_state.py",
        "moa/parallel/expert_parallel.py",
        "moa/parallel/exchange.py",
    },
}
CALLED = ("predict",)
"""Folders whose `__init__` gives public names as well, as those of the packages do."""
COMMANDS = (
    ["trainer/run.py"],
    ["-m", "trainer.evaluate"],
    ["-m", "trainer.predict"],
    ["-m", "trainer.doctor"],
    ["-m", "trainer.export"],
    ["-m", "trainer.flatness"],
    ["-m", "trainer.plan"],
    ["-m", "trainer.report"],
    ["-m", "trainer.sweep"],
    ["-m", "trainer.sweep.slurm_array"],
    ["-m", "trainer.bench"],
    ["-m", "shards.writer"],
    ["-m", "shards.preview"],
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {
    module_name(path): path
    for package in ORDER
    for path in sorted((ROOT / package).glob("**/*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_file(name: str) -> str | None:
    """The module of ours that a dotted name lies in; None for other people's."""
    while name not in FILES:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return name


GRAPH = {
    name: {file for found in imported(tree) if (file := own_file(found))} - {name}
    for name, tree in TREES.items()
}
"""Module -> modules of ours that it imports, at the top or within functions."""


def room_of(module: str) -> str:
    """The folder or file right below the package, of which `ORDER` speaks."""
    return module.split(".")[1] if "." in module else ""


def floors(package: str) -> dict[str, int]:
    """Room -> how far to the left it stands."""
    groups = re.split(" > ", ORDER[package])
    return {
        room: len(groups) - place
        for place, group in enumerate(groups)
        for room in group.split(", ")
    }


def test_packages_do_not_reach_where_they_must_not() -> None:
    for name, tree in TREES.items():
        for found in imported(tree):
            assert found.split(".")[0] not in FORBIDDEN[name.split(".")[0]], f"{name}: {found}"


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_one_way_between_folders(package: str) -> None:
    floor = floors(package)
    rooms = {room_of(name) for name in FILES if name.startswith(f"{package}.")}
    assert rooms == set(floor), "ORDER names every folder and file once"
    for name, targets in GRAPH.items():
        for target in targets:
            here, there = room_of(name), room_of(target)
            if (
                name.startswith(f"{package}.")
                and target.startswith(f"{package}.")
                and here != there
            ):
                assert floor[here] > floor[there], f"{name} imports {target}"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; empty where there is none."""
    open_, done = [], set()

    def visit(name: str) -> list[str]:
        if name in open_:
            return open_[open_.index(name) :]
        if name in done:
            return []
        open_.append(name)
        found = next((ring for target in sorted(graph[name]) if (ring := visit(target))), [])
        open_.pop()
        done.add(name)
        return found

    return next((ring for name in sorted(graph) if (ring := visit(name))), [])


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(GRAPH) == []
    first, second = "moa.layers.layer", "moa.layers.router"
    assert circle({**GRAPH, second: {*GRAPH[second], first}}) == [first, second]


def test_every_folder_says_what_it_is() -> None:
    folders = {path.parent for path in FILES.values()}
    for folder in folders:
        tree = TREES[module_name(folder / "__init__.py")]
        (line,) = (ast.get_docstring(tree) or "").splitlines()
        assert line.endswith("."), folder
        if folder.parent != ROOT and folder.name not in CALLED:
            assert len(tree.body) == 1, f"{folder}: a docstring and nothing else"
        entries = [path for path in folder.iterdir() if not path.name.startswith(("_", "."))]
        assert len(entries) <= 20, f"{folder} has {len(entries)} entries"


def test_engine_libraries_stay_in_their_files() -> None:
    for library, files in MAY_IMPORT.items():
        users = {
            FILES[name].relative_to(ROOT).as_posix()
            for name, tree in TREES.items()
            if any(found == library or found.startswith(f"{library}.") for found in imported(tree))
        }
        assert users == files, library


def test_no_name_hides_another_module() -> None:
    """`deepspeed trainer/run.py` puts trainer/ first on the import path."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    distributions = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in wanted}
    installed = {
        module
        for module, owners in packages_distributions().items()
        if distributions & {owner.lower().replace("_", "-") for owner in owners}
    }
    assert {"torch", "timm", "deepspeed", "peft", "yaml"} <= installed
    for path in FILES.values():
        for name in (path.stem, path.parent.name):
            assert name not in (installed | sys.stdlib_module_names) - {"__main__", *ORDER}, path


def test_files_are_short() -> None:
    for path in FILES.values():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 300, f"{path} has {lines} lines"


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
