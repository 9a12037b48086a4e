"""`--eval.mode selection`: less is evaluated, and what is reported stays the same."""

from pathlib import Path
from typing import Any

import pytest

from moa.files.reading import read_adapter
from tests.support import warm
from tests.support.trainer_fixtures import ROOT, arguments, environment, launch, rows
from trainer.config.run_config import CheckpointConfig
from trainer.evaluate.selection import training_domain_validation, validation_accuracy
from trainer.process.errors import RESUBMIT

# A rate that soon spoils the adapter, so that the last one is not the selected one.
SPOILING = {"optim__lr": "0.04", "train__seed": "4", "train__eval_every": "2"}
HELD_OUT = 5  # of the six embedded domains


def accuracies(row: Any) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key.endswith("_acc") or key == "step"}


def stopped_at_the_end(command: list[str]) -> None:
    """Two processes, one of which gets a signal in the very last evaluation."""
    worker = str(ROOT / "tests" / "support" / "stopping_worker.py")
    result = warm.run(worker, "closing", *command, processes=2, env=environment())
    assert result.returncode == RESUBMIT, result.stderr
    assert result.stderr.count("leaves the group, with nothing of 3 left") == 2


@pytest.mark.timeout(900)
def test_two_rows_tell_what_all_would(few: dict[str, str], tmp_path: Path) -> None:
    """At ZeRO-3, stopped between the two, finished elsewhere, and then extended."""
    whole, output, spoiling = tmp_path / "whole", tmp_path / "run", SPOILING | few
    result = launch(*arguments(whole, train__steps="8", **spoiling))
    assert result.returncode == 0, result.stderr
    wanted = {row["step"]: accuracies(row) for row in rows(whole / "results.jsonl")}
    assert list(wanted) == [0, 2, 4, 6, 7]

    short = arguments(output, train__steps="7", eval__mode="selection", **spoiling)
    stopped_at_the_end([*short, "--ds_config=ds_configs/zero3.json"])
    (first,) = rows(output / "results.jsonl")
    assert not (output / "done").exists()
    result = launch(*short)
    assert result.returncode == 0, result.stderr
    found = rows(output / "results.jsonl")
    assert found[0] == first, "not evaluated again"
    assert [row["step"] for row in found] == [4, 6]
    for row in found:
        assert accuracies(row) == wanted[row["step"]]
    evaluated = rows(output / "evaluations.jsonl")
    assert [row["step"] for row in evaluated] == [0, 2, 4, 6]
    sources = [f"env{i}_out_acc" for i in range(6) if i != HELD_OUT]
    for row in evaluated:
        assert accuracies(row) == {k: wanted[row["step"]][k] for k in ("step", *sources)}
    for kept in (found, evaluated, list(wanted.values())[:4]):
        assert training_domain_validation(kept, (HELD_OUT,))["step"] == 4
    assert "Selected step 4" in result.stdout

    result = launch(*arguments(output, train__steps="8", eval__mode="selection", **spoiling))
    assert result.returncode == 0, result.stderr
    found = rows(output / "results.jsonl")
    assert [accuracies(row) for row in found] == [wanted[4], wanted[7]]
    card = read_adapter(output / "adapter")[0].results
    assert card == wanted[4], "the card tells all, not only what chose the adapter"


def test_the_mode_stays_what_it_was() -> None:
    (problem,) = CheckpointConfig(allow_changes=("eval.mode",)).problems()
    assert "'eval.mode' cannot change within a run" in problem


def test_validation_needs_no_more_than_the_sources_out() -> None:
    row = {"step": 1, "env0_out_acc": 0.25, "env2_out_acc": 0.5, "moa/env1_left_out_acc": 0.9}
    assert validation_accuracy(row, (1,)) == 0.375
    assert validation_accuracy({**row, "env1_out_acc": 1.0, "env1_in_acc": 1.0}, (1,)) == 0.375
