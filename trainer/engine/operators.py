"""DeepSpeed's compiled operators: where they are kept, and a word before the first use."""

import hashlib
import logging
import os
import sys
from pathlib import Path

import torch

log = logging.getLogger(__name__)

VARIABLE = "TORCH_EXTENSIONS_DIR"
ON_CPU = "deepspeed_shm_comm"
"""What DeepSpeed compiles to communicate on CPUs."""


def prepare(cpu: bool) -> None:
    """Lets this environment find ninja, and its compiled operators again.

    Environments of one user share torch's folder of operators. DeepSpeed compiles them anew, a
    silent minute, whenever the paths of its headers differ from the last time; two environments
    would undo each other's work at every start. What the user set stays.

    Args:
        cpu: whether the processes communicate on CPUs.
    """
    # Where an environment that was not activated has ninja, PATH does not lead there.
    programs = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", "")])
    environment = f"{sys.prefix} {sys.version} {torch.__version__}"
    name = hashlib.sha256(environment.encode()).hexdigest()[:12]
    folder = Path.home() / ".cache" / "torch_extensions" / f"moa-trainer-{name}"
    folder = Path(os.environ.setdefault(VARIABLE, str(folder)))
    if cpu and not any((folder / ON_CPU).glob("*.so")):
        log.info("compiling DeepSpeed's operator: about a minute, once per environment")
