"""The prediction of a step, against hand-made numbers."""

import pytest

from trainer.scaling import Load, Rates, predict

RATES = Rates(flops=1e12, node=1e9, network=1e8, latency=1e-3, gpus_per_node=4)
LOAD = Load(
    flops=1e9, frozen_bytes=8e6, trainable=1000, expert_bytes=4e5, token_bytes=2e6, layers=3,
    modules=5, stage=2,
)  # fmt: skip


def test_one_gpu_only_computes() -> None:
    step = predict(LOAD, 1, 10, 1, RATES)
    assert step.compute == pytest.approx(10 * 1e9 / 1e12)
    assert (step.gradients, step.weights, step.experts) == (0, 0, 0)
    assert step.efficiency == 1


def test_terms_by_hand() -> None:
    step = predict(LOAD, 4, 10, 2, RATES)
    assert step.gradients == pytest.approx(2 * 1e-3 * 2 + 8000 * 3 / 4 / 1e9)
    assert step.experts == pytest.approx(2 * 1e-3 * 1 + 2 * 4e5 / 2 / 1e9)
    assert step.weights == 0
    assert step.seconds == pytest.approx(step.compute + step.gradients + step.experts)


def test_beyond_a_node_the_network_counts() -> None:
    inside, outside = predict(LOAD, 4, 10, 4, RATES), predict(LOAD, 8, 10, 8, RATES)
    assert outside.gradients == pytest.approx(2 * 1e-3 * 3 + 8000 * 7 / 8 / 1e8)
    assert outside.experts > 5 * inside.experts / 2


def test_zero3_gathers_the_backbone_twice() -> None:
    import dataclasses

    step = predict(dataclasses.replace(LOAD, stage=3), 4, 10, 1, RATES)
    assert step.weights == pytest.approx(2 * 5 * 1e-3 * 2 + 2 * 8e6 * 3 / 4 / 1e9)


def test_tokens_travel_per_layer_and_image() -> None:
    import dataclasses

    step = predict(dataclasses.replace(LOAD, transport="all_to_all"), 2, 10, 2, RATES)
    assert step.experts == pytest.approx(5 * 3 * 1e-3 + 2 * 2e6 * 10 / 2 / 1e9)
