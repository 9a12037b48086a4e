"""The prediction of a step, against hand-made numbers."""

from dataclasses import replace

import pytest

from trainer.plan.scaling import Load, Rates, predict, with_passes
from trainer.prepare.footprint import Footprint

RATES = Rates(flops=1e12, node=1e9, network=1e8, latency=1e-3, gpus_per_node=4)
LOAD = Load(
    images=10, flops=1e9, frozen_bytes=8e6, trainable=1000, expert_bytes=4e5, layers=3, modules=5,
    stage=2, ep_size=2, transport="gather",
)  # fmt: skip
ALONE = replace(LOAD, expert_bytes=0, ep_size=1, transport=None)


def test_one_gpu_only_computes() -> None:
    step = predict(ALONE, 1, RATES)
    assert step.compute == pytest.approx(10 * 1e9 / 1e12)
    assert (step.gradients, step.weights, step.experts) == (0, 0, 0)
    assert step.efficiency == 1


def test_terms_by_hand() -> None:
    step = predict(LOAD, 4, RATES)
    assert step.gradients == pytest.approx(2 * 1e-3 * 2 + 8000 * 3 / 4 / 1e9)
    assert step.experts == pytest.approx(2 * 1e-3 * 1 + 4e5 / 1e9)
    assert step.weights == 0
    assert step.seconds == pytest.approx(step.compute + step.gradients + step.experts)


def test_passes_of_an_objective_are_computed_and_launched() -> None:
    footprint = Footprint(
        images=1, kept=0, peak=0, evaluation=0, forward=3 * 10**8, backward=7 * 10**8, recomputed=0
    )
    load = with_passes(replace(LOAD, operations=300), footprint, whole=2, forward=2)
    assert (load.flops, load.operations) == (2 * 1e9 + 2 * 3e8, 800)
    assert with_passes(LOAD, footprint, whole=1, forward=0) == LOAD


def test_beyond_a_node_the_network_counts() -> None:
    inside, outside = (predict(replace(LOAD, ep_size=n), n, RATES) for n in (4, 8))
    assert outside.gradients == pytest.approx(2 * 1e-3 * 3 + 8000 * 7 / 8 / 1e8)
    assert outside.experts == pytest.approx(2 * 1e-3 * 3 + 4e5 / 1e8)
    assert inside.experts == pytest.approx(2 * 1e-3 * 2 + 4e5 / 1e9)


def test_zero3_gathers_the_backbone_twice() -> None:
    step = predict(replace(ALONE, stage=3), 4, RATES)
    assert step.weights == pytest.approx(2 * 5 * 1e-3 * 2 + 2 * 8e6 * 3 / 4 / 1e9)


def test_tokens_travel_per_layer() -> None:
    step = predict(replace(LOAD, transport="all_to_all"), 2, RATES)
    assert step.experts == pytest.approx(6 * 3 * 1e-3 + 4e5 / 1e9)


def test_every_micro_batch_gathers_and_from_stage_2_on_reduces() -> None:
    def seconds(stage: int, pieces: int) -> tuple[float, float, float]:
        step = predict(replace(ALONE, stage=stage, accumulation=pieces), 4, RATES)
        return step.compute, step.gradients, step.weights

    bucket = 1e-3 * 2 + 4000 * 3 / 4 / 1e9
    for stage in (1, 2, 3):
        whole, parts = seconds(stage, 1), seconds(stage, 4)
        assert parts[0] == whole[0]
        assert whole[1] == pytest.approx(2 * bucket)
        assert parts[1] == pytest.approx((2 if stage == 1 else 5) * bucket), "one for new weights"
        assert parts[2] == pytest.approx(4 * whole[2])
    for transport, number in (("gather", 2), ("all_to_all", 18)):
        load = replace(LOAD, accumulation=4, transport=transport)  # type: ignore[arg-type]
        step = predict(load, 4, RATES)
        # The bytes of a whole step are `moa.placement.traffic`'s; each collective waits anew.
        assert step.experts == pytest.approx(4 * number * 1e-3 + 4e5 / 1e9)


def test_a_slow_host_or_loader_sets_the_pace() -> None:
    rates = replace(RATES, operation=1e-4, loader=50)
    device = predict(ALONE, 4, rates)
    assert (device.bound, device.seconds) == ("device", device.device)
    host = predict(replace(ALONE, operations=1000), 4, rates)
    assert (host.bound, host.seconds) == ("host", pytest.approx(0.1))
    assert host.device == device.device, "what the GPU needs is still told"
    loader = predict(replace(ALONE, operations=1000, loaders=1), 4, rates)
    assert (loader.bound, loader.seconds) == ("loader", pytest.approx(10 / 50))


def test_a_shared_batch_has_fewer_images_and_as_many_operations() -> None:
    load = replace(LOAD, operations=7)
    assert load.of(8, 40) == replace(load, images=5), "gathered experts are as large as before"
    tokens = replace(load, transport="all_to_all")
    assert tokens.of(8, 40).expert_bytes == LOAD.expert_bytes / 2
