"""Where blocks cannot be compiled is said before the weights are read, with what helps."""

import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch._inductor.runtime.cache_dir_utils import cache_dir as used

from trainer.config.command_line import parse
from trainer.prepare.compiling import CACHE
from trainer.prepare.parts import build
from trainer.process.errors import ConfigError, OutputError
from trainer.process.world import World

ONE_OF_TWO = World(1, 2, 1, 2)


@pytest.fixture
def start(
    few: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., bool]]:
    """Whether a process finds its blocks compiled, with the flags given and the caches' folder."""
    monkeypatch.setenv("MOA_CACHE", str(tmp_path / "cache"))

    def started(*flags: str) -> bool:
        own = [f"--data.root={few['data__root']}", "--model.compile=blocks", *flags]
        model = build(parse(own), ONE_OF_TWO).model
        return any(module._compiled_call_impl is not None for module in model.modules())

    with torch._inductor.config.patch(compile_threads=8):
        yield started


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("--ds_config=ds_configs/zero3.json", "--ds_config ds_configs/zero2.json"),
        ("--moa.ep_size=2", "--moa.ep_size 1"),
    ],
)
def test_parameters_that_are_fetched_while_a_block_runs(
    flag: str, remedy: str, start: Callable[..., bool]
) -> None:
    with pytest.raises(ConfigError) as caught:
        start(flag)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("model.compile: blocks with ")
    assert line.endswith(f"use --model.compile off, or {remedy}")
    assert start(flag, *remedy.split())
    assert not start(flag, "--model.compile=off")


def test_no_compiler(
    start: Callable[..., bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-program")
    with pytest.raises(ConfigError, match=r"needs a compiler: no no-such-program on the PATH"):
        start()
    monkeypatch.delenv("CXX")
    assert start(), "as the message says: one on the PATH"
    gpp = shutil.which("g++")
    assert gpp is not None
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no g\+\+ on the PATH, and CXX names none.*compile off"):
        start()
    monkeypatch.setenv("CXX", gpp)
    assert start(), "or one that CXX names"
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"Python's headers \(package python3-dev\): no Python\.h"
    ):
        start()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="no gcc or clang on the PATH, and CC names none"):
        start()
    assert not start("--model.compile=off")


def test_what_is_compiled_is_kept(
    start: Callable[..., bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder that the user names, else with other caches: never where torch puts it."""
    monkeypatch.setenv(CACHE, f"{tmp_path}/torchinductor_mine")
    assert start()
    assert used() == f"{tmp_path}/torchinductor_mine"
    monkeypatch.delenv(CACHE)
    used()  # as an import does
    assert start()
    assert used() == f"{tmp_path}/cache/compiled"
    assert torch._inductor.config.compile_threads == 1
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE, f"{tmp_path}/file/below")
    with pytest.raises(OutputError, match=f"{CACHE}: cannot write .* give another folder"):
        start()


def test_a_backbone_without_blocks(start: Callable[..., bool]) -> None:
    flags = ("--model.backbone=resnet18", "--model.weights=random", "--moa.method=linear")
    with pytest.raises(
        ConfigError, match=r"ResNet has no `blocks\.N` to compile; leave model.comp"
    ):
        start(*flags)
    assert not start(*flags, "--model.compile=off")
