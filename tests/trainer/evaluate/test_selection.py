"""Selection rules on rows written by hand, whose answers one can see."""

import pytest

from tests.support.report_fixtures import evaluation
from trainer.evaluate.selection import (
    Choice,
    by_class_means,
    by_leaving_one_out,
    by_oracle,
    by_training_domains,
    columns_of,
    num_domains,
    training_domain_validation,
    validation_accuracy,
)

ROWS = [
    evaluation(0, (0.1, 0.5), (0.9, 0.5), (0.70, 1.0)),
    evaluation(5, (0.1, 0.8), (0.9, 0.6), (0.80, 0.0)),
    evaluation(9, (0.1, 0.6), (0.9, 0.8), (0.90, 0.9)),
]


def test_training_domain_validation_is_domainbeds() -> None:
    assert num_domains(ROWS[0]) == 3
    assert validation_accuracy(ROWS[0], withheld=(2,)) == 0.5, "the held-out domain does not count"
    assert training_domain_validation(ROWS, withheld=(2,))["step"] == 5, "the first of equals"
    assert by_training_domains(ROWS, 2) == Choice(5, pytest.approx(0.7), 0.8), "the in accuracy"
    assert by_training_domains(ROWS, 0).step == 9
    with pytest.raises(ValueError, match="no evaluation"):
        training_domain_validation([], 0)


def test_class_means_decide_alone_and_are_told_of_the_chosen_row() -> None:
    means = [(0.9, 0.1, 0.3), (0.4, 0.5, 0.2), (0.5, 0.5, 0.9)]  # of the out splits
    rows = [
        row | {f"moa/env{env}_{s}_class_mean": m for env, m in enumerate(ms) for s in ("in", "out")}
        for row, ms in zip(ROWS, means, strict=True)
    ]
    assert by_class_means(rows, 2) == Choice(0, pytest.approx(0.5), 0.7, 0.3), "first of equals"
    assert by_class_means(rows, 0) == Choice(9, pytest.approx(0.7), 0.1, 0.5)
    assert by_training_domains(rows, 2) == Choice(5, pytest.approx(0.7), 0.8, 0.2), "as before"
    assert by_class_means(ROWS, 2) is None
    assert by_class_means([*rows[:2], ROWS[2]], 2) is None, "an older release wrote the last row"
    own = {"env0_in_acc": 0.1, "moa/env0_in_class_mean": 0.2, "moa/env0_left_out_acc": 0.3}
    ema = {f"moa/ema/{key.removeprefix('moa/')}": value for key, value in own.items()}
    assert columns_of("ema", {"env0_in_acc": 0.9, **ema}) == own


def test_oracle_takes_the_last_step_and_ranks_by_the_targets_out() -> None:
    assert by_oracle(ROWS, 2) == Choice(9, 0.9, 0.9)
    assert by_oracle(ROWS, 0) == Choice(9, 0.6, 0.1)
    assert by_oracle(ROWS[::-1], 1) == Choice(9, 0.8, 0.9), "by step, not by place"
    with pytest.raises(ValueError, match="no evaluation"):
        by_oracle([], 0)


def test_leave_one_out_asks_runs_that_saw_neither_domain() -> None:
    # Only env0_in of the run without 0 and 2, and env1_in of the run without 1 and 2, may count.
    without_0 = [evaluation(s, (v, 0), (9, 9), (9, 9)) for s, v in ((0, 0.2), (5, 0.3), (9, 0.9))]
    without_1 = [evaluation(s, (9, 9), (v, 0), (9, 9)) for s, v in ((0, 0.8), (5, 0.7), (9, 0.0))]
    pairs = {0: without_0, 1: without_1}
    chosen = by_leaving_one_out(ROWS, 2, pairs)
    assert chosen == Choice(0, pytest.approx(0.5), 0.70), "steps 0 and 5 tie, the first wins"
    assert by_leaving_one_out(ROWS, 2, {0: without_0}) is None, "domain 1 cannot vote"
    late = {0: without_0, 1: without_1[1:]}
    assert by_leaving_one_out(ROWS, 2, late) == Choice(5, pytest.approx(0.5), 0.80)
    assert by_leaving_one_out(ROWS, 2, {0: without_0, 1: []}) is None
    assert by_leaving_one_out([], 2, pairs) is None
