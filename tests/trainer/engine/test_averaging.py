"""EMA and SWAD against brute force over the weights of every step."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from moa.files.reading import read_adapter
from shards import DataConfig, open_shards
from tests.support.trainer_fixtures import arguments, kill_after_step, launch, rows
from trainer.config.averages import AVERAGES, AverageConfig
from trainer.engine.averaging import BetaAverage, Ema, UniformAverage
from trainer.engine.swad import Mean, Swad

APPLIED = torch.tensor(True)
KINDS = ("ema", "swad", "uniform")
AVERAGING = {
    "average__uniform": "2",
    "average__ema": "true", "average__ema_decay": "0.7", "average__swad": "true",
    "average__swad_n_converge": "2", "average__swad_n_tolerance": "2",
    "train__eval_every": "2", "eval__mode": "selection",
    "checkpoint__every": "1", "checkpoint__keep": "20",
}  # fmt: skip


def valley(losses: Sequence[float], ns: int, ne: int, ratio: float) -> tuple[int, int]:
    """First and last segment of the average, straight from the paper's Algorithm 1."""
    start, end, level = 0, len(losses) - 1, None
    for i in range(len(losses)):
        if level is None:
            if i >= ns - 1 and losses[i - ns + 1] == min(losses[i - ns + 1 : i + 1]):
                start = i - ns + 1
                level = ratio * sum(losses[i - ns + 1 : i + 1]) / ns
        elif i >= ne - 1 and level < min(losses[i - ne + 1 : i + 1]):
            end = i - ne
            break
    return start, end


def ema_of(weights: Sequence[Tensor], decay: float) -> Tensor:
    average = weights[0].double()
    for step, weight in enumerate(weights[1:], start=1):
        now = min(decay, 1 - (1 + step) ** (-2 / 3))
        average = now * average + (1 - now) * weight.double()
    return average


def after(losses: Sequence[float], **settings: Any) -> tuple[Swad, list[list[float]]]:
    """The average over numbers 1, 2, ... in segments of unequal length, and those segments."""
    swad, segments, number = Swad(**settings), [], 0
    for i, loss in enumerate(losses):
        segments.append([])
        for _ in range(1 + i % 3):
            number += 1
            segments[-1].append(float(number))
            swad.add([torch.tensor([float(number)], dtype=torch.float64)], APPLIED)
        swad = swad.closed(loss)
    return swad, segments


def mean_of(swad: Swad) -> float:
    values = swad.mean().values
    assert values is not None
    return float(values[0])


@pytest.mark.parametrize(
    ("losses", "start", "end"),
    [
        # Falls until evaluation 3, is flat, and leaves the level 1.3 * 1.05 at evaluation 7.
        ([3, 2, 1.5, 1, 1.05, 1.1, 1.2, 2, 2, 2, 2, 2, 2, 0.1], 3, 6),
        # Comes back within the level before the sixth in a row: the valley goes on to the end.
        ([3, 2, 1.5, 1, 1.05, 1.1, 2, 2, 2, 2, 2, 1.2, 2, 2], 3, None),
        ([5, 4, 3, 2, 1], None, None),  # never settles
        ([2, 2, 2], 0, None),  # equal losses are a valley
    ],
)
def test_valleys_made_by_hand(losses: list[float], start: int | None, end: int | None) -> None:
    swad, segments = after(losses)
    assert (swad.start, swad.end) == (start, end)
    inside = segments[start or 0 : None if end is None else end + 1]
    numbers = [number for segment in inside for number in segment]
    assert mean_of(swad) == pytest.approx(sum(numbers) / len(numbers), rel=1e-12)


def test_any_curve_gives_what_the_algorithm_says() -> None:
    source = random.Random(5)
    ended = 0
    for _ in range(400):
        ns = source.randint(1, 4)
        ne, ratio = ns + source.randint(0, 3), source.choice([1.0, 1.1, 1.3])
        losses = [source.choice([0.5, 0.8, 1.0, 1.3, 2.0]) for _ in range(source.randint(1, 20))]
        swad, segments = after(losses, n_converge=ns, n_tolerance=ne, tolerance_ratio=ratio)
        start, end = valley(losses, ns, ne, ratio)
        numbers = [number for segment in segments[start : end + 1] for number in segment]
        assert mean_of(swad) == pytest.approx(sum(numbers) / len(numbers), rel=1e-12), losses
        assert len(swad.waiting) <= max(ns, ne), "memory does not grow with the run"
        ended += swad.end is not None
        again = Swad(ns, ne, ratio).restored(
            swad.facts(), {n: m.values for n, m in swad.means().items() if m.values}
        )
        assert again.facts() == swad.facts()
        assert mean_of(again) == mean_of(swad)
    assert 50 < ended < 350


def test_an_evaluation_leaves_the_average_before_as_it_was() -> None:
    swad, _ = after([1.0, 1.0, 1.0, 1.0])
    swad.add([torch.tensor([100.0], dtype=torch.float64)], APPLIED)
    before = mean_of(swad), swad.facts()
    swad.closed(1.0)
    swad.closed(9.0).add([torch.zeros(1, dtype=torch.float64)], APPLIED)
    assert (mean_of(swad), swad.facts()) == before


@pytest.mark.parametrize("warmup", [True, False])
def test_averages_are_of_the_steps_that_were_applied(warmup: bool) -> None:
    """As timm and a plain mean have them of those steps alone."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(2, 50, generator=generator) for _ in range(30)]
    left_out = {0, 1, 7, 29}
    config = AverageConfig(ema=True, ema_decay=0.8, ema_warmup=warmup)
    ema, swad = Ema(list(weights[0]), config), Swad()
    timm = ModelEmaV3(held(weights[0]), decay=0.8, use_warmup=warmup)
    for step, weight in enumerate(weights):
        applied = torch.tensor(step not in left_out)
        ema.update(list(weight), step, applied)
        swad.add(list(weight), applied)
        if applied:
            timm.update(held(weight), step=int(ema.count))
    assert int(ema.count) == swad.mean().count == 26
    expected = torch.stack(list(timm.module.parameters()))
    torch.testing.assert_close(torch.stack(ema.values), expected, rtol=1e-6, atol=1e-7)
    kept = [weight for step, weight in enumerate(weights) if step not in left_out]
    values = swad.mean().values
    assert values is not None
    torch.testing.assert_close(torch.stack(values), torch.stack(kept).mean(0), rtol=0, atol=1e-6)
    uniform = UniformAverage(5, Mean())
    for step, weight in enumerate(weights):
        uniform.update(list(weight), step, torch.tensor(step not in left_out))
    late = [weight for step, weight in enumerate(weights[5:], 5) if step not in left_out]
    assert uniform.fact() == len(late) == 23
    torch.testing.assert_close(torch.stack(uniform.values or []), torch.stack(late).mean(0))
    if warmup:
        torch.testing.assert_close(
            expected.detach(), ema_of(kept, 0.8).float(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_beta_average_is_the_closed_sum_at_every_step(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(2, 50, generator=generator, dtype=torch.float64) for _ in range(41)]
    shares = stats.beta.pdf((np.arange(41) + 0.5) / 41, beta, beta)
    running = BetaAverage(list(weights[0]), beta, 40)
    for step, weight in enumerate(weights[1:]):
        running.update(list(weight), step, APPLIED)
        known = zip(shares[: step + 2], weights[: step + 2], strict=True)
        expected = sum(w * t for w, t in known) / shares[: step + 2].sum()
        torch.testing.assert_close(torch.stack(running.values), expected, rtol=1e-12, atol=1e-12)
    assert (shares[0] > shares[20]) == (beta < 1), "heavy at the ends below 1"


def held(weights: Tensor) -> nn.Module:
    return nn.ParameterList([nn.Parameter(weight, requires_grad=False) for weight in weights])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema_decay": 1.0}, "average.ema_decay: 1.0; must be a number >= 0 and < 1"),
        ({"swad_n_converge": 0}, "average.swad_n_converge: 0"),
        ({"swad_n_tolerance": 2}, "average.swad_n_tolerance: 2; must be a whole number >="),
        ({"swad_tolerance_ratio": 0.9}, "average.swad_tolerance_ratio: 0.9"),
        ({"beta": -0.5}, "average.beta: -0.5; must be a finite number >= 0"),
        ({"uniform": -1}, "average.uniform: -1; must be a whole number from 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    (problem,) = AverageConfig(ema=True, swad=True, **settings).problems()
    assert message in problem


def test_settings_of_an_average_that_is_not_kept() -> None:
    problems = AverageConfig(ema_decay=0.9, swad_n_converge=2, swad=False).problems()
    assert [problem.partition(";")[0] for problem in problems] == [
        "average.ema_decay: has no effect without --average.ema true",
        "average.swad_n_converge: has no effect without --average.swad true",
    ]
    assert AverageConfig(ema=True, ema_decay=0.9).problems() == []


def masters_by_step(output: Path) -> list[dict[str, Tensor]]:
    folders = sorted((output / "checkpoints").glob("step-*"))
    return [load_file(folder / "adapter_model.safetensors") for folder in folders]


@pytest.mark.timeout(900)
def test_averages_across_topologies_equal_those_of_all_checkpoints(
    few: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    for steps, processes, settings in (
        ("3", 2, {"moa__ep_size": "2"}),
        ("6", 2, {"ds_config": "ds_configs/zero3.json"}),
        ("9", 0, {}),
    ):
        command = arguments(output, train__steps=steps, **AVERAGING, **few, **settings)
        result = launch(*command, processes=processes)
        assert result.returncode == 0, result.stderr
    every = masters_by_step(output)
    assert len(every) == 9
    state = (output / "checkpoints" / "step-00000009" / "state.json").read_text()
    facts = json.loads(state)["averages"]
    losses = facts["swad"]["losses"]
    assert len(losses) == 5, "the closing evaluation at step 5 is no longer one"
    start, end = valley(losses, 2, 2, 1.3)
    steps = [step for step in range(9) if start <= (step + 1) // 2 <= end]
    for name in every[0]:
        weights = [tensors[name] for tensors in every]
        averaged = torch.stack([weights[step] for step in steps]).double().mean(0)
        uniform = torch.stack(weights[2:]).double().mean(0)
        by_kind = {"ema": ema_of(weights, 0.7), "swad": averaged, "uniform": uniform}
        for kind, expected in by_kind.items():
            found = load_file(output / f"adapter-{kind}" / "adapter_model.safetensors")[name]
            torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    row = rows(output / "results.jsonl")[-1]
    for kind in KINDS:
        columns = {k: row[f"moa/{kind}/{k}"] for k in row if k.startswith("env")}
        assert len(columns) == 12
        assert read_adapter(output / f"adapter-{kind}")[0].results == {"step": 8} | columns
    assert_curves_show(output, row)


def assert_curves_show(output: Path, row: dict[str, Any]) -> None:
    """TensorBoard's last points of the averages are the row's numbers."""
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    for kind in KINDS:
        for env, domain in enumerate(open_shards(DataConfig()).domains):
            point = events.Scalars(f"average/{kind}/{domain}/out_acc")[-1]
            assert point.step == row["step"]
            assert point.value == pytest.approx(row[f"moa/{kind}/env{env}_out_acc"], abs=1e-7)


@pytest.mark.timeout(900)
def test_killed_and_resumed_averages_are_those_of_one_run(
    few: dict[str, str], tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "run"
    settings = {**AVERAGING, **few, "train__steps": "8", "average__beta": "0.5"}
    settings |= {"optim__schedule": "linear", "optim__warmup": "0.25", "optim__head_lr": "3"}
    result = launch(*arguments(whole, **settings))
    assert result.returncode == 0, result.stderr
    kill_after_step(arguments(output, **settings), 4)
    result = launch(*arguments(output, **settings))
    assert result.returncode == 0, result.stderr
    for name in (*(f"adapter-{average}" for average in AVERAGES), "adapter-last"):
        file = Path(name) / "adapter_model.safetensors"
        assert (output / file).read_bytes() == (whole / file).read_bytes(), name
    kept = [[{k: v for k, v in row.items() if k.endswith("_acc")} for row in rows(f)]
            for f in (output / "results.jsonl", whole / "results.jsonl")]  # fmt: skip
    assert kept[0] == kept[1]
    assert "moa/swad/env5_in_acc" in kept[0][-1]
    rates = [row["lr"] for row in rows(output / "metrics.jsonl")]
    assert [rate / max(rates) for rate in rates] == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4, 0.2, 0]
    )
    longer = launch(*arguments(output, **settings | {"train__steps": "9"}))
    assert longer.returncode == 2
    assert "train.steps: the run in" in longer.stderr
    assert (whole / "adapter-ema" / file.name).read_bytes() != (whole / file).read_bytes()
