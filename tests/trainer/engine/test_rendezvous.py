"""What is said when the processes of a run cannot meet."""

import os
import socket

import pytest
import torch.distributed as dist

from tests.support.warm import free_port
from trainer.engine.rendezvous import meeting
from trainer.process.errors import PEER_LOST, ConfigError
from trainer.process.world import World

WAITING = World(rank=1, size=4, local_rank=1, local_size=4)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a rank's environment, as `torchrun` or another job has left it."""
    told = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost",
            "MASTER_PORT": free_port()}  # fmt: skip
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    return told["MASTER_PORT"]


def test_a_rank_that_waits_says_so_and_ends(port: str, capfd: pytest.CaptureFixture[str]) -> None:
    """While its main thread waits in torch, for which they come here as it gives up."""
    codes: list[int] = []
    stores = []

    def leave(code: int) -> None:
        codes.append(code)
        main = dist.TCPStore("localhost", int(port), is_master=True, wait_for_workers=False)
        stores.append(main)

    with meeting(WAITING, 0.6, leave):
        next(dist.rendezvous("env://"))  # type: ignore[no-untyped-call]
    assert codes == [PEER_LOST]
    lines = [line for line in capfd.readouterr().err.splitlines() if "rank 1 of 4" in line]
    alone = "; for a run of one process unset RANK WORLD_SIZE"
    assert lines == [
        f"rank 1 of 4 (RANK, WORLD_SIZE): waiting for the others at localhost:{port}{alone}",
        f"error: rank 1 of 4 (RANK, WORLD_SIZE): the others did not come to localhost:{port} in "
        f"1 s{alone}",
    ]


def test_a_port_in_use_is_named_with_the_way_out(port: str) -> None:
    with socket.socket() as other:
        other.bind(("", int(port)))
        other.listen()
        os.environ["RANK"] = "0"
        with (
            pytest.raises(ConfigError, match=rf"cannot open port {port}, .*--master_port"),
            meeting(World(0, 4, 0, 4), 0),
        ):
            next(dist.rendezvous("env://"))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"MASTER_PORT": "80x"}, "cannot meet the others at localhost:80x"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR not set; start with deepspeed, torchrun or srun"),
    ],
)
def test_variables_that_cannot_be_right_are_named(
    changes: dict[str, str], told: str, port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=told), meeting(WAITING, 0):
        next(dist.rendezvous("env://"))  # type: ignore[no-untyped-call]


def test_a_rank_beyond_the_world_is_refused(port: str) -> None:
    with pytest.raises(ConfigError, match=r"rank 4 of 4 .*no such rank"), meeting(
        World(4, 4, 0, 1), 0
    ):  # fmt: skip
        raise AssertionError("it may not come to this")
