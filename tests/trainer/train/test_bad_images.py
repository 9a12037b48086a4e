"""Bad images in a whole run: counted in every record, kept over a resume, and at last its end."""

from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

import trainer.prepare.vit_embedded  # noqa: F401  (registers the embedded backbone)
from shards import DomainStream, ShardIndex
from shards.errors import DamagedDataError
from shards.stream.bad_samples import BadSample
from tests.support.shards_fixtures import damage, few_digits
from tests.support.trainer_fixtures import arguments, launch, rows
from trainer.evaluate.evaluator import Evaluator
from trainer.evaluate.predictions import collect, figures_of
from trainer.process.world import World
from trainer.train.bad_images import BadImages

SOURCES = range(5)
BAD = 10  # every how many-th image is damaged


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Eight of each embedded digit and style, with a byte flipped in every 10th image."""
    index = few_digits(tmp_path_factory.mktemp("damaged"), per_class=8)
    for env in range(6):
        for row in index.table(env)[::BAD]:
            damage(index.root / index.shards[int(row["shard"])].file, int(row["offset"]) + 40)
    index.close()
    return ShardIndex.load(index.root)


def expected_counts(index: ShardIndex, steps: int) -> dict[str, int]:
    stream = stream_of(index)
    counts: Counter[str] = Counter()
    for step in range(steps):
        for env, _, rank in zip(*stream.slots(step), strict=True):
            if rank % BAD == 0:
                counts[f"moa/bad/{index.domains[env]}/crc32"] += 1
    return dict(counts)


def stream_of(index: ShardIndex) -> DomainStream:
    return DomainStream(
        index, sources=SOURCES, batch_per_domain=4, seed=3, trial_seed=0,
        transform=lambda x: x,  # type: ignore[arg-type, return-value]
    )  # fmt: skip


def columns(row: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in row.items() if name.startswith("moa/bad/")}


def test_counts_reach_every_record_and_survive_a_resume(
    damaged: ShardIndex, tmp_path: Path
) -> None:
    output, given = tmp_path / "run", {"data.root": str(damaged.root)}
    command = arguments(output, **given, train__steps="8")
    assert launch(*command).returncode == 0
    result = launch(*arguments(output, **given))
    assert result.returncode == 0, result.stderr
    metrics = rows(output / "metrics.jsonl")
    for row in metrics:
        assert columns(row) == expected_counts(damaged, int(row["step"]) + 1)  # type: ignore[call-overload]
    total = expected_counts(damaged, 13)
    assert sum(total.values()) > 3
    results = rows(output / "results.jsonl")
    assert columns(results[-1]) == total
    unusable = sum(v for k, v in results[-1].items() if k.startswith("moa/unusable/"))  # type: ignore[misc]
    assert unusable == sum(-(-damaged.num_samples(env) // BAD) for env in range(6))
    assert f"bad images {sum(total.values())}" in result.stdout
    assert "is damaged" in (output / "log.txt").read_text()
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    for name, count in total.items():
        assert events.Scalars(name.replace("moa/", "data/", 1))[-1].value == count


def test_an_unusable_image_counts_as_it_is_guessed(damaged: ShardIndex) -> None:
    """By a model that always says 3: all images of that class count as right, used or not."""

    class Three(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.one_hot(torch.full((len(x),), 3), 10).float()

    model = timm.create_model("vit_embedded")
    evaluator = Evaluator(
        index=damaged, data_config=timm.data.resolve_model_data_config(model), trial_seed=0,
        holdout_fraction=0.2, batch_size=16, workers=0, world=World(0, 1, 0, 1),
        device=torch.device("cpu"), dtype=torch.float32, sum_over_ranks=lambda value: value,
    )  # fmt: skip
    counts = evaluator(Three(), [(0, "all")])
    labels = damaged.labels(0)
    right, unusable = (labels == 3).sum(), -(-len(labels) // BAD)
    assert counts == {(0, "all"): (right, len(labels), unusable, pytest.approx(0.1))}
    assert (labels[::BAD] == 3).any()
    (predictions,) = collect(evaluator, [Three()], 0, "all")
    figures = figures_of(predictions)
    assert (figures.correct, figures.samples, figures.unusable) == counts[0, "all"][:3]


def test_too_many_end_the_run_on_all_ranks(damaged: ShardIndex, tmp_path: Path) -> None:
    command = arguments(
        tmp_path / "run", **{"data.root": str(damaged.root), "data.max_bad_fraction": "0"}
    )
    result = launch(*command, processes=2)
    assert result.returncode == 65
    assert "more than data.max_bad_fraction = 0.0 allows" in result.stderr
    assert "Traceback" not in result.stderr


def test_ranks_are_added_up_and_agree(damaged: ShardIndex) -> None:
    stream = stream_of(damaged)
    ranks = [BadImages(stream, 0.1, {"plain/undecodable": 2}) for _ in range(2)]

    def sample(env: int) -> BadSample:
        return BadSample(env, "k", "s", 0, "crc32", "")

    ranks[0].note([sample(0), sample(0), sample(1)])
    ranks[1].note([sample(1)])
    together = [sum(counts) for counts in zip(*(r.of_step() for r in ranks), strict=True)]
    for rank in ranks:
        rank.end_step(4, together)
    for rank in ranks:
        assert rank.state() == {"plain/crc32": 2, "plain/undecodable": 2, "inverted/crc32": 2}
        rank.note([sample(1)] * 9)
        with pytest.raises(DamagedDataError, match="'inverted': 11 of 24 images"):
            rank.end_step(5, rank.of_step())
