"""Every command of the documentation is one that exists, and runs unless it says why not."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from glob import glob
from importlib.util import module_from_spec, spec_from_file_location
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.embedded.digits import embedded_shards
from tests.support import warm
from tests.support.docs_blocks import PAGES, ROOT, Block, blocks
from tests.support.image_folders import make_own_images
from tests.support.shards_fixtures import few_digits
from tests.support.trainer_fixtures import DEEPSPEED, launch
from trainer.config.command_line import parse
from trainer.evaluate.members import base_of, read_members
from trainer.plan.__main__ import read_command_line
from trainer.sweep import slurm_array

_PLACE = spec_from_file_location("pages", ROOT / "docs" / "pages.py")
assert _PLACE is not None
assert _PLACE.loader is not None
pages = module_from_spec(_PLACE)
_PLACE.loader.exec_module(pages)
ALL = [block for page in PAGES for block in blocks(page)]
RUNNING = sorted({block.page for block in ALL if not block.needs})
SHELL = set(
    "git cd source tensorboard pip cat less ls rm srun squeue scancel scontrol sacct tail cp "
    "salloc torchrun export apptainer bash jq for done kill wandb apt-get".split()
)
ASSIGNMENT = re.compile(r"[A-Z_]+=")
SOONER = {
    "-m trainer.flatness": "-m trainer.flatness --samples=4 --points=5 --steps=3",
    "--held_out plain,inverted": "--held_out plain",
}
"""What stands in for words that would compute for half a minute or more."""
TIES = re.compile(r"[|&;<>$]")
"""What makes lines of a shell more than one command each."""


def where(block: Block) -> str:
    return f"{block.page}:{block.line}"


def check_command(words: list[str]) -> None:
    """Raises if a command of ours has a flag or value that is not legal."""
    while words and ASSIGNMENT.match(words[0]):
        words = words[1:]
    if "trainer/run.py" in words:
        parse(words[words.index("trainer/run.py") + 1 :])
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{re.escape(words[1])}:", makefile, re.M), words
    elif words[0] == "sbatch":
        scripts = [word for word in words if word.endswith(".sh")]
        assert len(scripts) == 1, words
        assert (ROOT / scripts[0]).is_file(), words
    elif words[:3] == ["python", "-m", "trainer.plan"]:
        read_command_line(words[3:])
    elif words[:3] == ["python", "-m", "trainer.sweep.slurm_array"]:
        slurm_array.read_command_line(words[3:])
    elif words[:2] == ["python", "-m"] and words[2].partition(".")[0] in ("trainer", "shards"):
        module = pages.command_module(words[2])
        if hasattr(module, "parser"):
            module.parser().parse_args(words[3:])
    elif words[0] == "python" and words[1].startswith("examples/"):
        assert (ROOT / words[1]).is_file(), words
    elif words[:2] != ["python", "-c"]:
        assert words[0] in SHELL, f"what is {words[0]}?"


@pytest.mark.parametrize("block", ALL, ids=where)
def test_commands_have_legal_flags(block: Block) -> None:
    for words in block.commands():
        check_command(words)


def test_the_recipe_shown_is_legal(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    assert parse([f"--recipe={tmp_path / 'mine.yaml'}"]).moa.ranks == (1, 4, 16)


def test_wrong_commands_are_found() -> None:
    for command in (
        "python trainer/run.py --moa.rnks 1",
        "make nothing",
        "python examples/no.py",
        "sbatch slurm/no.sh",
        "foo",
    ):
        with pytest.raises((ValueError, AssertionError)):
            check_command(command.split())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the place of the embedded data a tenth of it."""
    folder = tmp_path_factory.mktemp("cache")
    index = few_digits(folder, per_class=3)
    index.root.rename(folder / embedded_shards().name)
    index.close()
    return folder


@pytest.fixture(scope="module")
def demo(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a short `make demo` leaves behind."""
    folder = tmp_path_factory.mktemp("docs") / "demo"
    short = ("--train.steps=3", "--train.eval_every=2")
    result = launch(f"--output_dir={folder}", *short, MOA_CACHE=str(cache))
    assert result.returncode == 0, result.stderr
    return folder


def run_line(line: str, folder: Path, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Runs a command without a shell where it is Python's."""
    for words_there, instead in SOONER.items():
        line = line.replace(words_there, instead)
    first, *rest = shlex.split(line, comments=True)
    words = list(chain(*(sorted(glob(word, root_dir=folder)) or [word] for word in rest)))
    if first == "python":
        return warm.run(*words, env=env, cwd=folder)
    if first == "deepspeed" and words[0] == "--num_gpus":  # that flag is tested with the run
        return warm.run(*words[2:], processes=int(words[1]), env=env, cwd=folder)
    if first == "deepspeed":
        return warm.run(DEEPSPEED, *words, env=env, cwd=folder)
    return run_script(line, folder, env)


def run_script(text: str, folder: Path, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", RUNNING)
def test_commands_run(page: str, cache: Path, demo: Path, tmp_path: Path) -> None:
    for top in ("trainer", "moa", "shards", "ds_configs", "slurm", "Makefile", "docs", "tests"):
        if (ROOT / top).exists():
            (tmp_path / top).symlink_to(ROOT / top)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    todo = [block for block in ALL if block.page == page and not block.needs]
    if any("my_images" in block.text for block in todo):
        make_own_images(tmp_path / "my_images")
    if any("outputs/demo" in block.text for block in todo):
        shutil.copytree(demo, tmp_path / "outputs" / "demo")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        "MOA_CACHE": str(cache),
    }
    for block in todo:
        lines = replace(block, text=block.script()).lines()
        bare = " ".join(shlex.join(shlex.split(line, comments=True)) for line in lines)
        run, texts = (run_script, [block.script()]) if TIES.search(bare) else (run_line, lines)
        for text in texts:
            result = run(text, tmp_path, environment)
            told = f"{where(block)}\n{text}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
            assert result.returncode == 0, told


def test_the_loop_of_your_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/own_loop.md").read_text(encoding="utf-8")
    told: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, told)
    assert (told["known"].classes, told["known"].results) == (
        told["info"].classes,
        told["info"].results,
    )
    with torch.no_grad():
        assert torch.equal(told["served"](told["image"]), told["model"].eval()(told["image"]))
    (member,) = read_members(["my_adapter"])
    assert base_of(member, None).sha256 == told["base_sha256"], "as trainer.evaluate makes it"


@pytest.mark.parametrize(
    ("name", "made"), [("reference.md", pages.flags_page), ("modules.md", pages.modules_page)]
)
def test_page_is_what_the_code_says(name: str, made: Callable[[], str]) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == made(), "run `make reference`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
