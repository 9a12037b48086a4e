"""Steps by static buffers give the numbers of steps as written, bit for bit; so do replays.

A replay is of a recording in which Python has no part any more, as in a CUDA graph (`taped`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moa
from moa import MoAConfig
from shards import Batch, DataConfig
from tests.support.tape import taped
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.averages import AverageConfig
from trainer.config.objective import ObjectiveConfig
from trainer.config.optim import OptimConfig
from trainer.config.run_config import RunConfig, TrainConfig
from trainer.engine import collectives
from trainer.engine.engine import Engine
from trainer.prepare.parts import build
from trainer.prepare.text_head import fill_head
from trainer.process.errors import ConfigError
from trainer.process.world import World
from trainer.train import graphed
from trainer.train.loop import Trainer

ALONE = World(0, 1, 0, 1)
STEPS = 4
BROKEN = 2
"""The step whose images are not finite."""
METHODS: dict[str, dict[str, Any]] = {
    "moa_kron": {},
    "moa_lora": {"balance": "bias", "balance_rate": 0.01, "top_k": 2, "expert_dropout": 0.1},
    "multi_lora": {"diversity": 0.5},
    "linear": {},
}
MIXED = {"data": DataConfig(mix="cutmix"), "objective": ObjectiveConfig(label_smoothing=0.1)}
"""What `linear` is trained with beside it."""


@pytest.fixture
def alone() -> Iterator[None]:
    collectives.start(ALONE)
    yield
    collectives.stop()


def trained(
    folder: Path,
    method: str,
    graph: str,
    around: Callable[[int], AbstractContextManager[object]] = lambda _: nullcontext(),
) -> dict[str, Any]:
    """What four steps of two micro-batches leave, the third of which is left out."""
    config = RunConfig(
        **(MIXED if method == "linear" else {}),  # type: ignore[arg-type]
        moa=MoAConfig(method=method, **METHODS[method]),  # type: ignore[arg-type]
        optim=OptimConfig(clip=0.5, lr=1e-2),
        average=AverageConfig(ema=True),
        train=TrainConfig(
            steps=STEPS, batch_per_domain=2, accumulation=2, seed=7, precision="fp32",
            skip_nonfinite=1, graph=graph,  # type: ignore[arg-type]
        ),
    )  # fmt: skip
    parts = build(config, ALONE)
    if method == "moa_lora":
        torch.manual_seed(0)
        with torch.no_grad():
            fill_head(parts.model.head, torch.randn(10, 8), nn.Linear(128, 8), 3.0)  # type: ignore[arg-type]
    engine = Engine(parts.model, config.optim, parts.ds_json, ALONE, config.moa)
    run = RunFolder(folder)
    run.path.mkdir(exist_ok=True)
    trainer = Trainer(parts, ALONE, engine, None, run, {})  # type: ignore[arg-type]
    trainer.rows.write = lambda: None  # type: ignore[method-assign]
    loader = parts.stream.loader(0, STEPS, 0, 1, workers=0, accumulation=2)
    engine.module.train()
    batches = broken(iter(loader))
    stats: list[dict[str, Any]] = []
    for step in range(STEPS):
        with around(step):
            trainer.train_step(batches)
        trainer.step = step + 1
        layers = moa.routing_stats(engine.module)
        stats.append({name: {k: t.clone() for k, t in s.items()} for name, s in layers.items()})
    trainer.behind.read()
    known = [{k: v for k, v in row.items() if k != "batch_digest"} for row in trainer.rows.known]
    tensors = {**engine.masters(), **trainer.validation.averages.tensors()}
    biases = {n: b.clone() for n, b in engine.module.named_buffers() if n.endswith("balance_steps")}
    return {"rows": known, "tensors": tensors, "biases": biases, "stats": stats}


def broken(batches: Iterator[Batch]) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        if number == 2 * BROKEN:
            batch = batch._replace(images=torch.full(batch.images.shape, torch.inf))
        yield batch


def equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("method", METHODS)
def test_static_buffers_and_replays_train_as_written(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With accumulation, a step left out, the average, a head of texts, what routers leave."""
    written = trained(tmp_path / "off", method, "off")
    assert [row.get("skipped_steps", 0) for row in written["rows"]] == [0, 0, 1, 1]
    equal(trained(tmp_path / "on", method, "on"), written)
    captures: list[object] = []

    def once(*args: Any) -> Callable[[], object]:
        captures.append(args)
        return taped(*args)

    monkeypatch.setattr(graphed, "captured", once)
    equal(trained(tmp_path / "replayed", method, "on"), written)
    assert len(captures) == 1
    if method == "moa_lora":
        assert any(bias.any() for bias in written["biases"].values())


def test_other_shapes_are_captured_anew_and_what_cannot_be_is_run_as_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, position = nn.Linear(2, 1), moa.RoutingPosition(0, 0, 0)
    shapes: list[int] = []
    runs: list[torch.Tensor] = []

    def refused(work: Callable[[], object], _: torch.device) -> Callable[[], object]:
        shapes.append(len(step._inputs[0]))
        raise RuntimeError("operation not permitted\nCUDA kernel errors might be")

    def compute(x: torch.Tensor) -> torch.Tensor:
        runs.append(x)
        return model(x).sum().detach()

    monkeypatch.setattr(graphed, "captured", refused)
    step = graphed.Graphed(model, compute, (), falls_back=True)
    for images in (3, 3, 4):
        x = torch.randn(images, 2)
        assert step([x], position) == model(x).sum()
    assert shapes == [3, 4]
    # As often as where it is captured, beside the warm-ups: sums over ranks have all their parts.
    assert [len(x) for x in runs] == [3, 3, 3, 3, 4, 4, 4]
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graph, since the step cannot be captured (operation not permitted)"
    ] * 2
    step = graphed.Graphed(model, compute)
    with pytest.raises(
        ConfigError, match=r"train\.graph: on, .* permitted\); use --train\.graph auto"
    ):
        step([x], position)


@pytest.mark.parametrize(
    ("wrong", "told"), [(7.0, "off by "), (torch.nan, "off by nan"), (None, "off by 1.7")]
)
def test_a_replay_that_does_something_else_is_found(
    wrong: float | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another result; or, with None, a gradient that is left as it was."""
    model, position = nn.Linear(2, 1, bias=False), moa.RoutingPosition(0, 0, 0)
    gradient = torch.zeros(1, 2)

    def compute(x: torch.Tensor) -> torch.Tensor:
        gradient.copy_(x.sum(0, keepdim=True))
        return model(x).sum().detach()

    def misled(work: Callable[[], object], _: torch.device) -> Callable[[], object]:
        work()
        return lambda: gradient.zero_() if wrong is None else step._result.fill_(wrong)

    monkeypatch.setattr(graphed, "captured", misled)
    step = graphed.Graphed(model, compute, [gradient], falls_back=True)
    x = torch.tensor([[1.0, 1.0], [0.0, 0.4]])
    for given in (x, 2 * x):
        assert step([given], position) == compute(given)
    (line,) = caplog.messages
    assert line.startswith("no CUDA graph, since the step cannot be captured (a replay is ")
    assert told in line
    step = graphed.Graphed(model, compute, [gradient])
    with pytest.raises(ConfigError, match=r"a replay is off by .* use --train\.graph auto or off"):
        step([x], position)
