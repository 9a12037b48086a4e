"""What torch's compiler needs, looked at before it has to work: a compiler, a folder."""

import os
import shutil
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import torch._inductor.config

from shards.embedded.digits import default_cache
from trainer.config.run_config import RunConfig
from trainer.process.errors import ConfigError, cannot_write

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable: the folder of compiled blocks, where later starts find them."""


def check_compiled(config: RunConfig, sharded: bool) -> None:
    """Raises `ConfigError` if blocks are to be compiled whose parameters are not at hand."""
    ep_size = config.moa.ep_size
    if config.model.compile == "off" or not (sharded or ep_size > 1):
        return
    what, remedy = "ZeRO-3", "--ds_config ds_configs/zero2.json"
    if not sharded:
        what, remedy = f"moa.ep_size {ep_size}", "--moa.ep_size 1"
    raise ConfigError(
        f"model.compile: blocks with {what}, which fetches parameters while a block runs; use "
        f"--model.compile off, or {remedy}"
    )


def prepare_compiler() -> None:
    """Gives the compiler its folder: `CACHE`, or `compiled` in the folder of other caches.

    Raises:
        ConfigError: it lacks something on this machine.
        OutputError: the folder cannot be written.
    """
    if missing := _missing():
        raise ConfigError(
            f"model.compile: blocks needs {missing}; use --model.compile off where there is none"
        )
    folder = Path(os.environ.get(CACHE, ""))
    # Importing torchvision sets it to torch's own choice, which lasts as long as temporary files.
    if folder.parent == Path(tempfile.gettempdir()) and folder.name.startswith("torchinductor_"):
        folder = Path()
    folder = default_cache() / "compiled" if folder == Path() else folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise cannot_write(CACHE, folder, error) from error
    os.environ[CACHE] = str(folder)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    # Processes that compile beside this one would get the signals that are meant for it.
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        torch._inductor.config.compile_threads = 1


def _missing() -> str:
    """What compiling on this machine's device lacks; empty if nothing."""
    on_gpu = torch.cuda.is_available()
    variable, programs = ("CC", ("gcc", "clang")) if on_gpu else ("CXX", ("g++",))
    given = os.environ.get(variable)
    if not any(map(shutil.which, (given,) if given else programs)):
        shown = given or " or ".join(programs)
        return f"a compiler: no {shown} on the PATH, and {variable} names none that is"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        return f"Python's headers (package python3-dev): no Python.h in {headers}"
    return "" if not on_gpu or find_spec("triton") else "the package triton: pip install triton"
