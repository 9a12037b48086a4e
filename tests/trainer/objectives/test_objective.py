"""Each objective against a slow formula, and which runs may have it."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.nn import functional as F

from tests.support.slow_objectives import slow_objective
from trainer.config.command_line import parse
from trainer.config.objective import Name, ObjectiveConfig
from trainer.config.run_config import RunConfig, TrainConfig
from trainer.objectives import objective as seam
from trainer.objectives.mixup import draw_ring
from trainer.objectives.objective import Seen, check_objective, objective_of, passes
from trainer.process.errors import ConfigError

SOURCES, EACH, CLASSES, WIDTH = 4, 5, 3, 6
ANNEALS = {"vrex_anneal": 2, "irm_anneal": 2}


def test_every_name_is_a_file_and_every_file_a_name() -> None:
    files = {path.stem for path in Path(seam.__file__).parent.glob("*.py")}
    assert files - {"__init__", "objective"} == set(get_args(Name))


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("name", ["erm", "groupdro", "vrex", "irm", "coral", "mmd"])
def test_value_and_gradient_are_those_of_the_formula(name: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    number = SOURCES * EACH
    scores = torch.randn(number, CLASSES, generator=generator, dtype=torch.float64)
    features = torch.randn(number, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (number,), generator=generator)
    q = torch.rand(SOURCES, generator=generator, dtype=torch.float64)
    leaves = [scores.requires_grad_(), features.requires_grad_()]
    config, slots = ObjectiveConfig(name=name, **ANNEALS), torch.arange(number)
    seen = Seen(
        scores=scores, labels=labels, losses=F.cross_entropy(scores, labels, reduction="none"),
        slots=slots, sources=SOURCES, each=EACH, total=lambda value: value, features=features,
    )  # fmt: skip
    objective = objective_of(config)
    found = objective.function(seen, step, {"q": q}, config)
    loss, penalty, after = slow_objective(
        config, scores, features, labels, slots % SOURCES, step, q
    )
    torch.testing.assert_close(found.loss, loss, rtol=1e-10, atol=1e-10)
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = [torch.autograd.grad(value, leaves, **options) for value in (found.loss, loss)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    assert gradients[0][1].any() == objective.needs_features
    assert objective.has_penalty == (penalty is not None) == (found.penalty is not None)
    if penalty is not None and found.penalty is not None:
        torch.testing.assert_close(found.penalty, penalty, rtol=1e-10, atol=1e-10)
    if name == "groupdro":
        torch.testing.assert_close(found.state["q"], after, rtol=1e-14, atol=0)


def test_rings_join_all_domains_and_follow_from_seed_and_step() -> None:
    rings = [draw_ring(seed, step, 5, 0.2) for seed in (0, 1) for step in range(20)]
    for ring in rings:
        visited, place = [], 0
        for _ in range(5):
            visited.append(place)
            place = int(ring.partners[place])
        assert sorted(visited) == [0, 1, 2, 3, 4]
        assert place == 0
        assert ((ring.shares >= 0) & (ring.shares <= 1)).all()
    again = draw_ring(1, 0, 5, 0.2)
    assert again.partners.equal(rings[20].partners)
    assert again.shares.equal(rings[20].shares)
    assert len({tuple(ring.shares.tolist()) for ring in rings}) == 40
    assert len({tuple(ring.partners.tolist()) for ring in rings}) > 10


def config_of(each: int = 4, accumulation: int = 1, **objective: Any) -> RunConfig:
    train = TrainConfig(batch_per_domain=each, accumulation=accumulation)
    return RunConfig(objective=ObjectiveConfig(**objective), train=train)


@pytest.mark.parametrize(
    ("config", "sources", "sharded", "message", "remedy"),
    [
        (config_of(1, name="irm"), 5, False, "needs 2 images of each domain", config_of(2)),
        (config_of(1, name="coral"), 5, False, "train.batch_per_domain is 1; raise", config_of(2)),
        (config_of(name="vrex"), 1, False, "vrex compares source domains", None),
        (config_of(name="mixup"), 1, False, "use --objective.name erm", None),
        (config_of(820, name="mmd"), 5, False, "the global batch has 4100 (5", config_of(819)),
        (config_of(sam=0.1), 5, True, "objective.sam: 0.1 with ZeRO-3", None),
    ],
)
def test_batches_that_are_none_for_an_objective(
    config: RunConfig, sources: int, sharded: bool, message: str, remedy: RunConfig | None
) -> None:
    with pytest.raises(ConfigError, match=r"^objective") as caught:
        check_objective(config, sources, sharded)
    (line,) = str(caught.value).splitlines()
    assert message in line
    other = replace(config, objective=ObjectiveConfig())
    if remedy is not None:
        other = replace(config, train=remedy.train)
    check_objective(other, sources, sharded)


def test_settings_out_of_range_or_of_another_objective() -> None:
    (line,) = ObjectiveConfig(name="irm", vrex_lambda=3.0).problems()
    assert line.startswith("objective.vrex_lambda: has no effect without --objective.name vrex")
    wrong = ObjectiveConfig(name="groupdro", groupdro_eta=0.0, sam=-1.0).problems()
    assert [problem.partition(";")[0] for problem in wrong] == [
        "objective.groupdro_eta: 0.0", "objective.sam: -1.0",
    ]  # fmt: skip
    for name in get_args(Name):
        assert parse([f"--objective.name={name}"]).objective.problems() == []


def test_passes_of_a_step() -> None:
    assert passes(config_of(accumulation=4)) == (1, 0)
    assert passes(config_of(name="coral")) == (1, 0)
    assert passes(config_of(accumulation=4, name="coral")) == (1, 1)
    assert passes(config_of(accumulation=4, name="irm", sam=0.1)) == (2, 2)
