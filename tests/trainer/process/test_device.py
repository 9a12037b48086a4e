"""Which device a process takes, how exactly it multiplies, and its share of the cores."""

import os
import subprocess
import sys

import pytest
import torch

from tests.support.trainer_fixtures import ROOT
from trainer.engine import collectives
from trainer.process.device import device_of, use_device
from trainer.process.world import World


@pytest.mark.parametrize(("devices", "number"), [(1, 0), (2, 1), (8, 3)])
def test_the_device_is_one_that_is_there_and_deepspeed_is_told(
    devices: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher may show each task one device of its own, whatever the task's number."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    world = World(rank=3, size=4, local_rank=3, local_size=4)
    expected = torch.device("cuda", number)
    assert device_of(world) == use_device(world) == expected
    assert chosen == [expected]
    assert os.environ["LOCAL_RANK"] == str(number)


TF32 = """
from trainer.process.device import tf32, use_device
from trainer.process.world import ALONE
before = tf32()
use_device(ALONE)
print(before, tf32())
"""


def test_products_in_fp32_are_not_rounded_to_tf32_whatever_an_image_sets() -> None:
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    command = [sys.executable, "-c", TF32]
    found = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    on, off = {"cublas": True, "cudnn": True}, {"cublas": False, "cudnn": False}
    assert found.stdout.strip() == f"{on} {off}"


@pytest.mark.parametrize(
    ("variables", "threads"),
    [({}, [2]), ({"SLURM_CPUS_PER_TASK": "8"}, [8]), ({"SLURM_CPUS_PER_TASK": "2"}, [2]),
     ({"OMP_NUM_THREADS": "3"}, [])],
)  # fmt: skip
def test_processes_share_the_cores_of_their_host(
    variables: dict[str, str], threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of them see eight cores; with as many for each task the cores are its own."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    collectives.share_cores(World(rank=1, size=4, local_rank=1, local_size=4))
    assert chosen == threads
