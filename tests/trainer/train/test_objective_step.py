"""Whole steps under an objective: resumed, with one of one's own, and what is carried."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moa import MoAConfig
from shards import DataConfig, finish_images
from shards.config import Mix
from shards.stream.mixup import labels_and_shares
from tests.support.trainer_fixtures import ROOT, arguments, rows
from trainer.config.objective import ObjectiveConfig
from trainer.config.run_config import RunConfig, TrainConfig
from trainer.engine import collectives
from trainer.engine.engine import Engine
from trainer.objectives import groupdro
from trainer.prepare.parts import build
from trainer.process.world import ALONE
from trainer.train import session
from trainer.train.loop import Trainer
from trainer.train.objective_step import ObjectiveStep


@pytest.fixture
def group() -> Iterator[None]:
    collectives.start(ALONE)
    yield
    collectives.stop()


def trained(
    objective: ObjectiveConfig, steps: int, accumulation: int = 1, mix: Mix = "none"
) -> tuple[Trainer, Any]:
    """A trainer after some steps, and their rows."""
    config = RunConfig(
        data=DataConfig(mix=mix),
        moa=MoAConfig(method="lora", blocks=(5,)),
        objective=objective,
        train=TrainConfig(steps=steps, batch_per_domain=4, accumulation=accumulation),
    )
    parts = build(config, ALONE)
    engine = Engine(parts.model, config.optim, parts.ds_json, ALONE, config.moa)
    trainer = Trainer(parts, ALONE, engine, None, None, {})  # type: ignore[arg-type]
    trainer.rows.write = lambda: None  # type: ignore[method-assign]
    batches = iter(parts.stream.loader(0, steps, accumulation=accumulation))
    engine.module.train()
    for step in range(steps):
        trainer.train_step(batches)
        trainer.step = step + 1
    trainer.behind.read()
    return trainer, trainer.rows.known


def test_state_and_restart_outlive_a_stop(
    few: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an objective that has both: GroupDRO's weights, and Adam anew in step 2."""
    both = replace(groupdro.OBJECTIVE, restarts=lambda step, config: step == 2)
    monkeypatch.setattr(groupdro, "OBJECTIVE", both)
    settings = few | {
        "objective__name": "groupdro", "objective__groupdro_eta": "0.5", "moa__method": "lora",
        "moa__blocks": "[5]", "train__eval_every": "50", "eval__mode": "selection",
    }  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for output, steps in ((whole, "4"), (cut, "3"), (cut, "4")):
        assert session.main(arguments(output, train__steps=steps, **settings)) == 0
    tables = [rows(output / "metrics.jsonl") for output in (whole, cut)]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 4
    weights, state = (
        "adapter-last/adapter_model.safetensors",
        "checkpoints/step-00000004/state.json",
    )
    assert (whole / weights).read_bytes() == (cut / weights).read_bytes()
    states = [json.loads((output / state).read_text()) for output in (whole, cut)]
    assert states[0]["objective"] == states[1]["objective"]
    assert states[0]["adam_steps"] == states[1]["adam_steps"] == 2
    q = states[0]["objective"]["q"]
    assert sum(q) == pytest.approx(1)
    assert len({round(weight, 6) for weight in q}) > 1


def test_carried_weights_are_restored_or_begin_anew(group: None) -> None:
    trainer, _ = trained(ObjectiveConfig(name="groupdro"), 1)
    facts = json.loads(json.dumps(trainer.micro_step.facts()))
    again = ObjectiveStep(trainer.parts, trainer.engine, facts)
    assert isinstance(trainer.micro_step, ObjectiveStep)
    assert again.state["q"].equal(trainer.micro_step.state["q"])
    for other in ({}, {"q": facts["q"][1:]}, {"p": facts["q"]}):
        assert ObjectiveStep(trainer.parts, trainer.engine, other).state["q"].tolist() == [1.0] * 5


def test_parameters_go_up_by_the_radius_and_come_back_to_the_bit(group: None) -> None:
    """Also where the gradient is not finite."""
    trainer, _ = trained(ObjectiveConfig(sam=0.05), 1)
    engine, step = trainer.engine, trainer.micro_step
    assert isinstance(step, ObjectiveStep)
    assert step.sam is not None
    (flat,) = engine.flats
    before = flat.parameter.detach().clone()
    for factor in (1.0, torch.nan):
        head = engine.trainables["head.weight"]
        step.sam.backward(factor * head.square().sum())
        with step.sam.up():
            moved = flat.parameter.detach() - before
            assert float(moved.norm()) == pytest.approx(0.05 * factor, rel=1e-4, nan_ok=True)
            assert not head.equal(flat.cut(before)["head.weight"]), "the model computes with it"
        assert flat.parameter.equal(before)


def soft_losses(
    scores: torch.Tensor, labels: torch.Tensor, others: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """In float64, of timm's soft targets: two labels weighted, 0.2 spread over all classes."""
    one, other = (F.one_hot(each, scores.shape[1]).double() for each in (labels, others))
    targets = shares[:, None] * one + (1 - shares[:, None]) * other
    targets = 0.8 * targets + 0.2 / scores.shape[1]
    return -(targets * scores.double().log_softmax(1)).sum(1)


@pytest.mark.parametrize("name", ["erm", "vrex"])
def test_mixed_and_smoothed_labels_weigh_the_loss(group: None, name: Any) -> None:
    """The same whatever the pieces, which part every image from what is mixed into it."""
    objective = ObjectiveConfig(name=name, label_smoothing=0.2)
    trainer, whole = trained(objective, 3, mix="mixup")
    _, pieces = trained(objective, 3, accumulation=10, mix="mixup")
    for row, other in zip(whole, pieces, strict=True):
        for column in row.keys() & {"loss", "ce", "penalty", "grad_norm"}:
            assert other[column] == pytest.approx(row[column], rel=1e-5), column
    scores = torch.randn(6, 10, requires_grad=True)
    labels, others, shares = torch.arange(6), torch.arange(6).flip(0) + 2, torch.rand(6)
    step = trainer.micro_step
    for given, wanted in (
        (step.mixed_losses(scores, labels, others, shares),
         soft_losses(scores, labels, others, shares)),
        (step.losses(scores, labels, "none"), soft_losses(scores, labels, labels, shares)),
    ):  # fmt: skip
        torch.testing.assert_close(given.double(), wanted, rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad(each.sum(), scores) for each in (given, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    parts = build(trainer.config, ALONE)
    (batch,) = parts.stream.loader(0, 1)
    assert batch.mix is not None
    images = finish_images(batch, torch.device("cpu"), parts.info.data_config)
    losses = soft_losses(parts.model(images), batch.labels, *labels_and_shares(batch.mix))
    assert whole[0]["ce"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_the_page_on_own_objectives_holds_one(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/objectives.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(block.splitlines()) <= 30
    module = ModuleType("trainer.objectives.worst")
    exec(block, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = replace(ObjectiveConfig(), name="worst")  # type: ignore[arg-type]
    _, whole = trained(config, 3)
    _, pieces = trained(config, 3, accumulation=2)
    assert len(whole) == 3
    for row, other in zip(whole, pieces, strict=True):
        assert row["penalty"] > 0
        assert row["loss"] == pytest.approx(row["ce"] + row["penalty"], rel=1e-5), "max, mean"
        for name in ("loss", "penalty", "grad_norm"):
            assert other[name] == pytest.approx(row[name], rel=1e-5), name
