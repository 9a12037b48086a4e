"""The learning rate as a function of the step, against torch's own schedules."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from trainer.config.averages import AverageConfig
from trainer.config.optim import OptimConfig
from trainer.config.run_config import RunConfig, TrainConfig
from trainer.process.errors import ConfigError

STEPS = 40


def by_torch(config: OptimConfig, warm: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    left, last = STEPS - 1 - warm, config.final_lr
    after: lr_scheduler.LRScheduler = {
        "constant": lambda: lr_scheduler.ConstantLR(optimizer, 1.0),
        "linear": lambda: lr_scheduler.LinearLR(optimizer, 1.0, last / config.lr, left),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, left, last),
    }[config.schedule]()
    schedule = after
    if warm:
        before = lr_scheduler.LinearLR(optimizer, 1 / (warm + 1), 1.0, warm)
        schedule = lr_scheduler.SequentialLR(optimizer, [before, after], [warm])
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "warm"), [(0.0, 0), (0.1, 4), (7.0, 7)])
def test_rates_are_those_of_torch(schedule: str, warmup: float, warm: int) -> None:
    final = 0.0 if schedule == "constant" else 2e-4
    config = OptimConfig(lr=1e-2, schedule=schedule, warmup=warmup, final_lr=final)  # type: ignore[arg-type]
    assert config.problems() == []
    rates = [config.rate(step, STEPS) for step in range(STEPS)]
    assert rates == pytest.approx(by_torch(config, warm), rel=1e-6)
    assert max(rates) == config.lr
    assert schedule == "constant" or rates[-1] == pytest.approx(final)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 2.5}, "optim.warmup: 2.5; must be a whole number of steps, or a share below 1"),
        ({"warmup": -1.0}, "optim.warmup: -1.0; must be a finite number >= 0"),
        ({"betas": (0.9, 1.0)}, "optim.betas: [0.9, 1.0]; must be two numbers >= 0 and < 1"),
        ({"head_lr": -1.0}, "optim.head_lr: -1.0; must be a finite number >= 0"),
        ({"final_lr": 1e-6}, "optim.final_lr: has no effect without --optim.schedule cosine"),
        (
            {"final_lr": 1.0, "schedule": "cosine"},
            "optim.final_lr: 1.0; must be at most optim.lr (5e-05)",
        ),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    (problem,) = OptimConfig(**settings).problems()  # type: ignore[arg-type]
    assert message in problem


def test_what_lies_beyond_the_end() -> None:
    config = RunConfig(
        optim=OptimConfig(warmup=10), average=AverageConfig(uniform=10), train=TrainConfig(steps=10)
    )
    with pytest.raises(ConfigError) as caught:
        config.check()
    assert str(caught.value).splitlines() == [
        "optim.warmup: 10 steps; must be fewer than train.steps (10)",
        "average.uniform: 10 steps; must be fewer than train.steps (10)",
    ]
