"""A step in full swing: what it asks of torch beside the model, and that it waits for nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moa import MoAConfig
from tests.support.dispatched import Dispatched
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.model import ModelConfig
from trainer.config.optim import OptimConfig
from trainer.config.run_config import RunConfig, TrainConfig
from trainer.engine import collectives
from trainer.engine.engine import Engine
from trainer.prepare.parts import build
from trainer.process.world import World
from trainer.train import loop, micro_step
from trainer.train.behind import BEHIND, Behind

ALONE = World(0, 1, 0, 1)
STEPS = 3


def steps(
    blocks: int, stage: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Dispatched]:
    """What each of some real steps asks for beside forward and backward; what is read late, too."""
    config = RunConfig(
        model=ModelConfig(),
        moa=MoAConfig(method="moa_kron"),
        optim=OptimConfig(clip=0.1),
        train=TrainConfig(steps=STEPS, batch_per_domain=1, seed=7),
        ds_config=f"ds_configs/zero{stage}.json",
    )
    parts = build(config, ALONE)
    first, rule = parts.model.blocks[0], parts.model.kron_rule
    alike = (copy.deepcopy(first, {id(rule): rule}) for _ in range(blocks))
    parts.model.blocks = nn.Sequential(*alike)
    parts.ds_json["zero_optimization"]["reduce_bucket_size"] = 2**24  # more than all of them
    engine = Engine(parts.model, config.optim, parts.ds_json, ALONE, config.moa)
    trainer = loop.Trainer(parts, ALONE, engine, None, RunFolder(folder), {})  # type: ignore[arg-type]
    batches = iter(parts.stream.loader(0, STEPS, 0, 1, workers=0))
    engine.module.train()
    found = []
    backward = torch.autograd.backward
    for step in range(STEPS):
        seen = Dispatched()

        def of_model(*args: Any, seen: Dispatched = seen, **options: Any) -> None:
            if engine.ds._running_engine_backward:  # DeepSpeed's, of the flat tensors
                return backward(*args, **options)
            with seen.left_out():
                return backward(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "backward", of_model)
            patch.setattr(F, "cross_entropy", seen.leaving_out(F.cross_entropy))
            adapted = trainer.micro_step.adapted
            patch.setattr(adapted, "aux_loss", seen.leaving_out(adapted.aux_loss))
            patch.setattr(micro_step, "poisoned", seen.leaving_out(micro_step.poisoned))
            patch.setattr(engine.module, "forward", seen.leaving_out(engine.module.forward))
            trainer.ahead.fetch(batches)  # a loader's work
            patch.setattr(trainer.ahead, "fetch", lambda _: None)
            patch.setattr(trainer.behind, "read", lambda leave: None)  # of numbers on the host
            with seen.watching():
                trainer.train_step(batches)
        trainer.behind.read(leave=BEHIND - 1)
        trainer.step = step + 1
        found.append(seen)
    return found


def test_a_steady_step_is_short_and_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the depth; what is read late is on the host by then."""
    collectives.start(ALONE)
    try:
        for stage in (1, 2):
            few, many = (steps(blocks, stage, tmp_path, monkeypatch) for blocks in (12, 48))
            for seen in (*few, *many):
                assert not seen.reads
            assert few[-1].operations == many[-1].operations
            assert 20 < sum(many[-1].operations.values()) <= 64, many[-1].operations
    finally:
        collectives.stop()


def test_vectors_are_read_in_order_and_none_after_an_error() -> None:
    found: list[float] = []

    def use(numbers: list[float]) -> None:
        found.extend(numbers)
        if numbers[0] == 3:
            raise ValueError("the third")

    behind = Behind()
    for number in range(1, 6):
        behind.read(leave=BEHIND - 1) if number < 4 else None
        behind.send(torch.tensor([float(number)]), use)
    assert found == [1.0]
    with pytest.raises(ValueError, match="the third"):
        behind.read()
    behind.read()
    assert found == [1.0, 2.0, 3.0]
