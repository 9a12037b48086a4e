"""Small checkpoints, and a child process that dies at a chosen point of writing one."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moa.config import MoAConfig
from moa.files.reading import AdapterInfo
from trainer.checkpoint import checkpoint

INFO = AdapterInfo("base", "0", MoAConfig(method="linear"), ("a",), {})
SIZE = 300


def tensors(tag: float) -> dict[str, torch.Tensor]:
    return {"head.weight": torch.full((SIZE,), tag), "head.bias": torch.full((3,), tag)}


def write(root: Path, step: int, tag: float, keep: int = 2) -> Path:
    """A checkpoint all of whose files tell `tag`."""
    moments = {f"{n}|{m}": t for m in ("exp_avg", "exp_avg_sq") for n, t in tensors(tag).items()}
    state = {"step": step, "tag": tag, "best": None, "closing_best": None}
    return checkpoint.save(root, INFO, tensors(tag), moments, state, keep, tensors(tag))


def two_checkpoints(root: Path) -> Path:
    """A root with checkpoints of steps 1 and 2, tagged alike."""
    for step in (1, 2):
        write(root, step, tag=step)
    return root


def tag_of(found: checkpoint.Checkpoint) -> float:
    """The tag that all parts of a checkpoint agree on."""
    assert found.best is not None
    parts = (found.masters, found.moments, found.best)
    tags = {value for part in parts for t in part.values() for value in t.tolist()}
    assert tags == {found.state["tag"]}, "parts of different saves"
    return float(found.state["tag"])


class Killer:
    """Names every point of what a process writes, and kills the process at one of them.

    Args:
        at: number of the point; None only collects the names.
    """

    def __init__(self, at: int | None) -> None:
        self.at, self.names = at, []  # type: tuple[int | None, list[str]]

    def point(self, name: str) -> None:
        self.names.append(name)
        if self.at == len(self.names) - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Patches this process for the rest of its life."""
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._around(name, getattr(os, name)))
        fsync = os.fsync

        def named_fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self._around("fsync", lambda _: fsync(descriptor))(path)

        os.fsync = named_fsync
        for name in ("write_bytes", "write_text"):
            setattr(Path, name, self._halved(getattr(Path, name)))

    def _around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            label = f"{name} {Path(path).name}"
            self.point(f"before {label}")
            result = real(path, *args, **options)
            self.point(f"after {label}")
            return result

        return call

    def _halved(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, content: Any, *args: Any, **options: Any) -> Any:
            self.point(f"before write {path.name}")
            real(path, content[: len(content) // 2], *args, **options)
            self.point(f"amid write {path.name}")
            result = real(path, content, *args, **options)
            self.point(f"after write {path.name}")
            return result

        return call


def in_child(action: Callable[[], object]) -> int:
    """Runs `action` in a fork; returns its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def points_of(action: Callable[[], object], note: Path) -> list[str]:
    """Names of all points that `action` passes, run in a child."""

    def child() -> None:
        killer = Killer(None)
        killer.install()
        action()
        with note.open("w") as file:
            json.dump(killer.names, file)

    assert in_child(child) == 0
    names: list[str] = json.loads(note.read_text())
    return names


def killed_at(point: int, action: Callable[[], object]) -> None:
    """Runs `action` in a child that is killed at the point with that number."""

    def child() -> None:
        Killer(point).install()
        action()

    status = in_child(child)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def fresh_copy(source: Path, target: Path) -> Path:
    """`target` as a copy of `source`, whatever it was before."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target
