"""Runs that hold out two domains: what they train on, what they tell, and who reads it."""

import json
from pathlib import Path

import pytest

from moa.files.reading import read_adapter
from shards import DataConfig, DataConfigError, DomainStream, open_shards
from shards.datasets import held_out_names
from tests.support.trainer_fixtures import arguments, launch, rows
from trainer.config.command_line import parse
from trainer.evaluate.members import Member, not_trained_on
from trainer.evaluate.selection import validation_accuracy
from trainer.prepare.parts import build
from trainer.process.errors import ConfigError
from trainer.process.world import ALONE
from trainer.report.runs import read_run
from trainer.sweep.grid import with_pairs


def test_names_of_one_domain_or_several() -> None:
    assert held_out_names("a+b", ["a", "b", "c"]) == ("a", "b")
    assert held_out_names("a+b", ["a", "b", "a+b"]) == ("a+b",), "a domain's own name"
    assert held_out_names("nowhere", ["a"]) == ("nowhere",)
    with pytest.raises(DataConfigError, match=r"data.held_out = 'a\+b\+a': names a domain twice"):
        held_out_names("a+b+a", ["a", "b"])


def test_every_pair_once() -> None:
    assert with_pairs(["a", "b", "c"]) == ("a", "b", "c", "a+b", "a+c", "b+c")


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ("plain+nowhere", "data.held_out = 'nowhere': not a domain of digits"),
        ("+".join(open_shards(DataConfig()).domains), "leaves no domain"),
    ],
)
def test_what_cannot_be_held_out(held_out: str, message: str) -> None:
    with pytest.raises((ConfigError, DataConfigError), match=message):
        build(parse([f"--data.held_out={held_out}"]), ALONE)


def test_a_run_trains_on_neither_and_tests_on_the_first(
    few: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    result = launch(*arguments(output, **few, data__held_out="outline+plain"))
    assert result.returncode == 0, result.stderr
    index = open_shards(DataConfig(root=few["data__root"]))
    target, other = index.domain_number("outline"), index.domain_number("plain")
    sources = [env for env in range(6) if env not in (target, other)]
    stream = DomainStream(
        index, sources=sources, batch_per_domain=4, seed=3, trial_seed=0, transform=lambda x: x
    )
    digests = [row["batch_digest"] for row in rows(output / "metrics.jsonl")]
    assert digests == [stream.batch_digest(step) for step in range(len(digests))]
    found = rows(output / "results.jsonl")
    mean = sum(found[-1][f"env{env}_out_acc"] for env in sources) / 4
    assert validation_accuracy(found[-1], (target, other)) == pytest.approx(mean)
    assert found[-1]["args"]["test_envs"] == sorted((target, other))
    best = max(found, key=lambda row: validation_accuracy(row, (target, other)))
    accuracy = f"{100 * best[f'env{target}_in_acc']:.1f}"
    assert f"held-out accuracy, outline │ {accuracy}" in " ".join(result.stdout.split())
    for name in ("outline", "plain"):
        assert f"{name} (held out)" in result.stdout
    assert read_run(output).held_out == tuple(sorted((target, other)))
    info, tensors = read_adapter(output / "adapter")
    assert info.origin is not None
    assert info.origin.withheld == ("outline", "plain")
    assert info.results["step"] == best["step"]
    member = Member("run", str(output), info, tensors)
    assert not_trained_on([member], "plain") == [member]
    assert not_trained_on([member], "coarse") == []
    stored = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert stored["origin"]["also_held_out"] == ["plain"]
