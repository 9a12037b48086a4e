"""What an installation has: commands, recipes, DeepSpeed files; images and the notebook."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.support.docs_blocks import ROOT
from trainer.engine.collectives import OPERATORS, operators_folder
from trainer.process import commands

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_console_command_is_a_module_of_ours() -> None:
    for name, target in PROJECT["scripts"].items():
        module, _, attribute = target.partition(":")
        assert module == commands.__name__
        start = getattr(commands, attribute)
        (started,) = start.args
        assert name == f"moa-{attribute}"
        assert import_module(started if started != "trainer.run" else "trainer.train.session")


def outside() -> dict[str, str]:
    """The environment without a way to this checkout, which pip would take for installed."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with the wheel in it, which sees only others' packages of this."""
    folder = tmp_path_factory.mktemp("installed")
    wheels, environment = folder / "wheels", folder / "environment"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = folder / "source"
    for name in ("moa", "shards", "trainer", "ds_configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run([*pip, *build], check=True, env=outside())
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", str(wheel)]
    into = ["--python", str(python)]
    subprocess.run([*pip[:3], *into, *pip[3:], *install], check=True, env=outside())
    (site,) = (environment / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def run(installed: Path, folder: Path, line: str) -> str:
    """A line of the shell, elsewhere than in the checkout; what it printed."""
    kept = outside()
    path = f"{installed / 'bin'}{os.pathsep}{kept['PATH']}"
    # Compiled for this environment, whose DeepSpeed it is: the other need not spend a minute.
    operators = {OPERATORS: str(operators_folder())}
    result = subprocess.run(
        shlex.split(line), cwd=folder, env={**kept, **operators, "PATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"{line}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def test_an_installed_wheel_trains_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, 'python -c "import trainer, moa; print(trainer.__file__)"')
    assert Path(where.strip()).is_relative_to(installed)
    for name in PROJECT["scripts"]:
        assert f"usage: {'' if name == 'moa-train' else 'python -m'}" in run(
            installed, tmp_path, f"{name} --help"
        )
    plan = run(installed, tmp_path, "moa-plan --recipe pacs --ds_config zero3 --json")
    assert json.loads(plan)
    run(
        installed, tmp_path,
        "moa-train --ds_config zero1 --train.steps 2 --train.batch_per_domain 1 "
        "--eval.mode selection --output_dir run",
    )  # fmt: skip
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["git_commit"] == "unknown"
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["origin"]["command"].startswith("moa-train --ds_config zero1 --train.steps 2")


def test_images_copy_what_is_there_and_share_their_recipe() -> None:
    docker = (ROOT / "Dockerfile").read_text()
    apptainer = (ROOT / "slurm" / "moa.def").read_text()
    files = re.search(r"%files\n(.*?)\n\n", apptainer, re.DOTALL)
    assert files is not None
    copied = {line.split()[0] for line in files[1].splitlines()}
    (line,) = re.findall(r"^COPY (.*) /opt/moa/$", docker, re.M)
    assert set(line.split()) | {"moa", "shards", "trainer", "ds_configs"} == copied
    for name in copied:
        assert (ROOT / name).exists(), name
    for text in (docker, apptainer):
        assert "bash /opt/moa/container.sh" in text
    base = re.search(r"^FROM (\S+)$", docker, re.M)
    assert base is not None
    assert f"From: {base[1]}\n" in apptainer


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    told: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            exec(code.replace("STEPS, BATCH = 120, 8", "STEPS, BATCH = 2, 2"), told)
    assert told["STEPS"] == 2
    assert told["known"] == {"rotated": told["found"]["rotated"]}
    assert told["accuracy"](told["served"], told["held_out"]) == told["found"]["rotated"]
