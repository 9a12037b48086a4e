"""Python commands as forks of one process that has imported what they need.

A command is what one gives to `python`: a script and its arguments, or `-m` and a module. It gets
the environment and files that a new interpreter would get, without seconds of imports.
"""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = [
    "trainer.prepare.libraries",
    "deepspeed.ops.op_builder.all_ops",
    "torch.utils.cpp_extension",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "tensorboard.plugins.hparams.plugin_data_pb2",
    "docstring_parser",
    "trainer.train.assembly",
    "trainer.train.session",
    "trainer.prepare.zero_check",
    "tests.support.drawn",
    "tests.support.frozen",
]
"""Nothing that a command runs as its main module."""

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(IMPORTED)


@cache
def serve() -> None:
    """Starts the process that forks, once; before threads that look at the environment meanwhile.

    Of Python 3.11 it is not told the parent's search path.
    """
    given = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(given)


class Started:
    """A command under way, to be handled as a `subprocess.Popen`."""

    def __init__(
        self,
        command: tuple[str, ...],
        output: Path,
        errors: Path,
        env: Mapping[str, str],
        cwd: Path = ROOT,
    ) -> None:
        serve()
        arguments = (command, output, errors, dict(env), cwd)
        self._process = _FORKS.Process(target=_become, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout:.0f} s")
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(
    command: tuple[str, ...], output: Path, errors: Path, env: Mapping[str, str], cwd: Path
) -> None:
    """Becomes the command, as leader of a session of its own."""
    os.setsid()
    for stream, path in ((1, output), (2, errors)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, stream)
        os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    first, *rest = command
    if first == "-m":
        name, *rest = rest
        sys.argv = [name, *rest]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ranks(size: int) -> list[dict[str, str]]:
    """What `torchrun` tells each of the processes of one host."""
    port = free_port()
    return [
        {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
         "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(size)
    ]  # fmt: skip


def run(
    *command: str,
    env: Mapping[str, str],
    processes: int = 0,
    cwd: Path = ROOT,
    timeout: float = 400,
) -> "subprocess.CompletedProcess[str]":
    """Runs a command to its end: plain, or in some processes that know of each other.

    As a launcher does, the first of them to fail decides the exit code and ends the others.
    """
    worlds = ranks(processes) if processes else [{}]
    with TemporaryDirectory() as folder:
        output, errors = Path(folder, "1"), Path(folder, "2")
        started = [Started(command, output, errors, {**env, **world}, cwd) for world in worlds]
        try:
            code = _first_failure(started, timeout)
        finally:
            for one in started:
                one.kill()
                one.wait(timeout)
        texts = (path.read_text(errors="replace") for path in (output, errors))
        return subprocess.CompletedProcess(command, code, *texts)


def _first_failure(started: list[Started], timeout: float) -> int:
    running = {one._process.sentinel: one for one in started}
    while running:
        ended = multiprocessing.connection.wait(list(running), timeout)
        if not ended:
            raise TimeoutError(f"nothing ended in {timeout:.0f} s")
        for code in [running.pop(sentinel).wait(timeout) for sentinel in ended]:  # type: ignore[call-overload]
            if code:
                for other in running.values():
                    other.send_signal(signal.SIGTERM)
                for other in running.values():
                    with suppress(TimeoutError):
                        other.wait(30)
                return code
    return 0
