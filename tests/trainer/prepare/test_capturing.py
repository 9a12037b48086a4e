"""A graph asked for where it cannot be is refused before the weights are read, with what helps."""

import pytest

from trainer.config.command_line import parse
from trainer.config.objective import ObjectiveConfig
from trainer.config.run_config import RunConfig
from trainer.prepare.capturing import is_captured, obstacle
from trainer.prepare.parts import build
from trainer.process.errors import ConfigError
from trainer.process.world import World

ONE_OF_TWO = World(1, 2, 1, 2)


@pytest.mark.parametrize(
    ("flag", "told", "remedy"),
    [
        ("--ds_config=ds_configs/zero3.json", "ZeRO-3,", "--ds_config ds_configs/zero2.json"),
        ("--moa.ep_size=2", "moa.ep_size 2,", "--moa.ep_size 1"),
        (
            "--model.grad_checkpointing=true",
            "model.grad_checkpointing,",
            "--model.grad_checkpointing false",
        ),
    ],
)
def test_what_no_graph_can_repeat(flag: str, told: str, remedy: str, few: dict[str, str]) -> None:
    own = [f"--data.root={few['data__root']}", "--train.graph=on", flag]
    with pytest.raises(ConfigError) as caught:
        build(parse(own), ONE_OF_TWO)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"train.graph: on with {told}")
    assert line.endswith(f"use --train.graph auto, or {remedy}")
    sharded = "zero3" in flag
    for more, captured in ((["--train.graph=auto"], False), (remedy.split(), True)):
        config = build(parse([*own, *more]), ONE_OF_TWO).config
        assert is_captured(config, sharded and not captured, on_gpu=True) is captured


def test_an_objective_of_several_passes() -> None:
    config = RunConfig(objective=ObjectiveConfig(name="irm"))
    found = obstacle(config, sharded=False)
    assert found == (
        "objective.name irm, whose step is more than one forward",
        "--objective.name erm",
    )
    sharp = RunConfig(objective=ObjectiveConfig(sam=0.1))
    assert obstacle(sharp, sharded=False) == (
        "objective.sam 0.1, whose steps have two passes",
        "--objective.sam 0",
    )
    assert obstacle(RunConfig(), sharded=False) is None


def test_auto_is_for_gpus() -> None:
    found = {
        setting: [
            is_captured(parse([f"--train.graph={setting}"]), False, gpu) for gpu in (False, True)
        ]
        for setting in ("auto", "on", "off")
    }
    assert found == {"auto": [False, True], "on": [True, True], "off": [False, False]}
