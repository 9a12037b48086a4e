import math

import pytest
import torch

from moa.layers.noise import (
    KEY_WORDS,
    LayersNoise,
    RoutingPosition,
    fresh_key,
    noise_keys,
    normal,
    uniform,
)


def key(seed: int = 0, step: int = 0, first: int = 0, layer: int = 0) -> torch.Tensor:
    return noise_keys(RoutingPosition(seed, step, first), layer + 1)[layer]


def test_first_numbers_stay_what_they_are() -> None:
    """Runs of earlier releases resume with the same noise: these values must not change."""
    drawn = normal(key(seed=1, step=2, first=3, layer=4), 1, 1, 4)[0]
    flat = uniform(key(seed=1, step=2, first=3, layer=4), 1, 1, 4)[0]
    assert drawn.tolist() == pytest.approx(NORMAL, abs=1e-5)
    assert flat.tolist() == pytest.approx(UNIFORM, abs=1e-6)


NORMAL = [0.199437, 1.583467, -0.991098, 0.22557]
UNIFORM = [0.47477, 0.3162022, 0.1260952, 0.2552831]


@pytest.mark.parametrize("shares", [(5,), (2, 3), (1, 1, 1, 1, 1)])
def test_a_part_of_the_batch_gets_its_part_of_the_numbers(shares: tuple[int, ...]) -> None:
    for draw in (normal, uniform):
        whole, parts, first = draw(key(), 5, 7, 3), [], 0
        for share in shares:
            parts.append(draw(key(first=first), share, 7, 3))
            first += share
        assert torch.equal(torch.cat(parts), whole)


def test_all_layers_at_once_draw_what_each_draws() -> None:
    keys = noise_keys(RoutingPosition(seed=3, step=1, first=2), 3)
    noise = LayersNoise(keys)
    for shape in ((2, 5, 4), (1, 7, 2), (2, 5, 4), (0, 5, 4)):
        for layer in (2, 0, 1):
            assert torch.equal(noise.normal(layer, *shape), normal(keys[layer], *shape))


def test_the_default_dtype_does_not_matter() -> None:
    before = normal(key(), 2, 3, 4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(normal(key(), 2, 3, 4), before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_seed_step_and_layer_each_change_everything() -> None:
    drawn = [
        normal(key(seed=s, step=t, layer=n), 4, 10, 3)
        for s in range(3) for t in range(3) for n in range(3)
    ]  # fmt: skip
    stacked = torch.stack([d.flatten() for d in drawn])
    correlation = torch.corrcoef(stacked)
    off = correlation - torch.eye(len(drawn))
    assert off.abs().max() < 5 / math.sqrt(stacked.shape[1])


def test_normal_numbers_are_normal() -> None:
    values = normal(key(), 500, 50, 4).double().flatten().sort().values
    grid = (torch.arange(len(values)) + 0.5) / len(values)
    distance = (torch.special.ndtr(values) - grid).abs().max()  # Kolmogorov and Smirnov
    assert distance < 1.95 / math.sqrt(len(values))
    columns = normal(key(), 500, 50, 4).double()
    assert (torch.corrcoef(columns.T) - torch.eye(4)).abs().max() < 5 / math.sqrt(25_000)
    lagged = torch.corrcoef(torch.stack([values_of(0)[:-1], values_of(0)[1:]]))[0, 1]
    assert abs(lagged) < 5 / math.sqrt(100_000)


def values_of(step: int) -> torch.Tensor:
    return normal(key(step=step), 500, 50, 4).double().flatten()


def test_uniform_numbers_are_uniform_and_apart_from_the_normal_ones() -> None:
    values = uniform(key(), 500, 50, 4).double()
    assert values.min() > 0
    assert values.max() <= 1
    counts = torch.histc(values, bins=50, min=0, max=1)
    expected = values.numel() / 50
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 49 + 5 * math.sqrt(2 * 49)
    both = torch.stack([values.flatten(), values_of(0)])
    assert torch.corrcoef(both)[0, 1].abs() < 5 / math.sqrt(100_000)


def test_a_key_of_torchs_own() -> None:
    torch.manual_seed(0)
    one, two = fresh_key(torch.device("cpu")), fresh_key(torch.device("cpu"))
    assert one.shape == (KEY_WORDS,)
    assert one[-1] == two[-1] == 0
    assert not torch.equal(one, two)
    torch.manual_seed(0)
    assert torch.equal(fresh_key(torch.device("cpu")), one)


def test_no_images() -> None:
    assert normal(key(), 0, 5, 3).shape == (0, 3)
