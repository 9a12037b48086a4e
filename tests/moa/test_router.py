import math
import statistics

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from moa.layers.precision import full_precision, wide_product
from moa.layers.router import CosineRouter, Routing, balance_counts, balance_loss, choose

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(2, 5))
SEEDS = st.integers(0, 2**31)


class Chooser(nn.Module):
    """A cosine router with its projection and its choice, as a layer uses it."""

    def __init__(self, router: CosineRouter, top_k: int) -> None:
        super().__init__()
        self.proj, self.embed, self.temperature = router.proj, router.embed, router.temperature
        self.hidden, self.top_k = (router,), top_k

    def logits(self, x: Tensor) -> Tensor:
        (router,) = self.hidden
        named = dict(self.named_parameters())
        with full_precision(x.device):
            projected = wide_product(x, self.proj.weight)
            logits: Tensor = functional_call(router, named, (projected,))
        return logits

    def forward(self, x: Tensor, noise: Tensor | None) -> Routing:
        return choose(self.logits(x), noise, self.top_k)


def make_router(
    dim: int = 6,
    experts: int = 4,
    router_dim: int = 5,
    top_k: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Chooser:
    """A router whose parameters are all of order one."""
    router = CosineRouter(dim, experts, router_dim, torch.zeros((), dtype=dtype))
    with torch.no_grad():
        router.embed.normal_()
        router.temperature.normal_()
    return Chooser(router, top_k)


def scalar_logits(router: Chooser, x: Tensor) -> list[list[float]]:
    """Plain Python, number by number."""
    weight, bias = router.proj.weight.tolist(), router.proj.bias.tolist()
    embeddings = router.embed.T.tolist()
    scale = math.exp(min(router.temperature.item(), math.log(100.0)))
    logits = []
    for token in x.tolist():
        z = [
            sum(w * value for w, value in zip(row, token, strict=True)) + b
            for row, b in zip(weight, bias, strict=True)
        ]
        logits.append(
            [
                scale
                * sum(a * b for a, b in zip(z, embed, strict=True))
                / (math.hypot(*z) * math.hypot(*embed))
                for embed in embeddings
            ]
        )
    return logits


def scalar_softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(value - max(logits)) for value in logits]
    return [weight / sum(weights) for weight in weights]


def scalar_route(
    logits: list[list[float]], noise: list[list[float]] | None, top_k: int
) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """Gates, noise-free probabilities, largest choosing probability."""
    gates, probs, tops = [], [], []
    for n, row in enumerate(logits):
        noisy = row if noise is None else [a + b for a, b in zip(row, noise[n], strict=True)]
        chosen = scalar_softmax(noisy)
        kept = sorted(range(len(row)), key=lambda e: -chosen[e])[:top_k]
        gates.append([p if e in kept else 0.0 for e, p in enumerate(chosen)])
        probs.append(scalar_softmax(row))
        tops.append(max(chosen))
    return gates, probs, tops


def scalar_loss(counts: list[list[float]]) -> float:
    """1/2 [CV^2(importance) + CV^2(load)] of one layer."""
    return 0.5 * sum(
        statistics.variance(row) / (statistics.fmean(row) ** 2 + 1e-10) for row in counts
    )


def phi(value: float) -> float:
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


def as_tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(SIZES, SEEDS, st.booleans(), st.data())
def test_routing_equals_scalar_loops(
    sizes: tuple[int, int, int, int], seed: int, noisy: bool, data: st.DataObject
) -> None:
    tokens, dim, router_dim, experts = sizes
    top_k = data.draw(st.integers(1, experts))
    torch.manual_seed(seed)
    router = make_router(dim, experts, router_dim, top_k)
    x = torch.randn(tokens, dim, dtype=torch.float64)
    noise = torch.randn(tokens, experts, dtype=torch.float64) if noisy else None
    logits = scalar_logits(router, x)
    torch.testing.assert_close(router.logits(x), as_tensor(logits), rtol=1e-10, atol=1e-10)

    routing = router(x, noise)
    gates, probs, tops = scalar_route(logits, None if noise is None else noise.tolist(), top_k)
    if router_dim > 1:  # in one dimension cosines tie exactly, and the choice is arbitrary
        torch.testing.assert_close(routing.gates, as_tensor(gates), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(routing.probs, as_tensor(probs), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(routing.top_prob, as_tensor(tops), rtol=1e-10, atol=1e-10)
    assert (routing.gates > 0).sum(-1).tolist() == [top_k] * tokens


def test_weights_are_not_renormalised() -> None:
    torch.manual_seed(0)
    routing = make_router(top_k=2)(torch.randn(20, 6, dtype=torch.float64), None)
    assert routing.gates.sum(-1).max().item() < 1
    kept = routing.gates > 0
    assert torch.equal(routing.gates[kept], routing.probs[kept])
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(20, dtype=torch.float64))


def test_noise_moves_the_choice_but_not_the_reported_probabilities() -> None:
    torch.manual_seed(0)
    router = make_router()
    x = torch.randn(50, 6, dtype=torch.float64)
    calm, noisy = router(x, None), router(x, torch.randn(50, 4))
    assert torch.equal(noisy.probs, calm.probs)
    assert not torch.equal(noisy.gates > 0, calm.gates > 0)


def test_gradients_of_the_gates() -> None:
    torch.manual_seed(0)
    router = make_router(top_k=2)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(4, 4, dtype=torch.float64)
    names, values = zip(*router.named_parameters(), strict=True)
    assert sorted(names) == ["embed", "proj.bias", "proj.weight", "temperature"]

    def gates(tokens: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        routing: Routing = functional_call(router, named, (tokens, noise))
        return routing.gates

    assert torch.autograd.gradcheck(gates, (x, *values))
    assert torch.autograd.gradgradcheck(gates, (x, *values))  # for the sharpness of minima


@pytest.mark.parametrize(
    ("temperature", "scale"),
    [(math.log(2), 2.0), (-1.0, math.exp(-1)), (4.6, math.exp(4.6)), (4.7, 100.0), (9.0, 100.0)],
)
def test_scale_stops_at_one_hundred(temperature: float, scale: float) -> None:
    torch.manual_seed(0)
    router = make_router()
    with torch.no_grad():
        router.temperature.fill_(temperature)
        router.embed[:, 0] = 0.5 * router.proj.weight[:, 0] + router.proj.bias
    logits = router.logits(torch.tensor([[0.5, 0, 0, 0, 0, 0]], dtype=torch.float64))
    assert logits[0, 0].item() == pytest.approx(scale, rel=1e-12)  # cosine one
    logits.square().sum().backward()
    assert router.temperature.grad is not None
    assert (router.temperature.grad.item() == 0) == (temperature > math.log(100))


def test_initial_values() -> None:
    torch.manual_seed(0)
    router = CosineRouter(12, 64, 256, torch.zeros(()))
    assert router.proj.weight.shape == (256, 12)
    assert router.proj.bias.shape == (256,)
    assert router.embed.shape == (256, 64)
    assert router.embed.std().item() == pytest.approx(0.01, rel=0.03)
    assert router.temperature.tolist() == pytest.approx([math.log(2)])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_arithmetic_is_wide(dtype: torch.dtype, computed: torch.dtype, autocast: bool) -> None:
    """As if the rounded tokens and parameters had been wide from the start, to the bit."""
    torch.manual_seed(0)
    narrow, wide = make_router(dtype=dtype), make_router(dtype=computed)
    wide.load_state_dict(narrow.state_dict())
    x, noise = torch.randn(40, 6, dtype=dtype), torch.randn(40, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, routing = narrow.logits(x), narrow(x, noise)
    assert torch.equal(logits, wide.logits(x.to(computed)))
    exact = as_tensor(scalar_logits(narrow, x))
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    expected = wide(x.to(computed), noise)
    for name in ("gates", "probs", "top_prob"):
        given_part = getattr(routing, name)
        assert given_part.dtype == computed
        assert torch.equal(given_part, getattr(expected, name))


def test_autocast_around_backward_leaves_the_temperature_exact() -> None:
    torch.manual_seed(0)
    router = make_router(dtype=torch.float32)
    x = torch.randn(500, 6)
    grads = []
    for enabled in (False, True):
        router.zero_grad()
        loss = router.logits(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss.backward()
        assert router.temperature.grad is not None
        grads.append(router.temperature.grad.item())
    assert grads[1] == pytest.approx(grads[0], rel=1e-6)


def test_a_zero_projection_gives_no_nan() -> None:
    router = make_router()
    with torch.no_grad():
        router.proj.bias.zero_()
    x = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    routing = router(x, None)
    assert routing.probs.tolist() == [[0.25] * 4] * 3
    routing.gates.sum().backward()
    for tensor in (x, *router.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_runs_on_the_meta_device() -> None:
    router = Chooser(CosineRouter(6, 4, 5, torch.zeros((), device="meta")), 2)
    assert router(torch.zeros(3, 6, device="meta"), None).gates.shape == (3, 4)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(2, 6), SEEDS)
def test_balance_equals_plain_python(tokens: int, experts: int, seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(tokens, experts, dtype=torch.float64)
    probs, top = logits.softmax(-1), torch.rand(tokens, dtype=torch.float64)
    counts = balance_counts([Routing(torch.zeros_like(probs), logits, top)])[0]
    importance = [sum(row[e] for row in probs.tolist()) for e in range(experts)]
    load = [
        sum(phi((probs[n, e].item() - top[n].item()) * experts) for n in range(tokens))
        for e in range(experts)
    ]
    torch.testing.assert_close(counts, as_tensor([importance, load]), rtol=1e-12, atol=1e-12)
    wanted = scalar_loss([importance, load])
    assert balance_loss(counts).item() == pytest.approx(wanted, rel=1e-10)


def test_layers_are_counted_apart() -> None:
    """All at once if they have as many tokens, one by one otherwise, with the same result."""
    torch.manual_seed(0)
    router = make_router()
    routings = [router(torch.randn(n, 6, dtype=torch.float64), None) for n in (5, 5, 7, 0)]
    each = torch.cat([balance_counts([routing]) for routing in routings])
    assert each.shape == (4, 2, 4)
    torch.testing.assert_close(balance_counts(routings), each, rtol=0, atol=0)
    torch.testing.assert_close(balance_counts(routings[:2]), each[:2], rtol=1e-12, atol=1e-12)


def test_balance_loss_sums_over_layers() -> None:
    torch.manual_seed(0)
    counts = torch.rand(3, 2, 4, dtype=torch.float64) * 50
    wanted = sum(scalar_loss(layer) for layer in counts.tolist())
    assert balance_loss(counts).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("counts", "loss"),
    [
        ([[2.0, 2.0], [5.0, 5.0]], 0.0),
        ([[4.0, 0.0], [1.0, 1.0]], 1.0),  # unbiased variance 8 over 4, halved
        ([[3.0, 0.0, 0.0], [0.0, 0.0, 6.0]], 3.0),
        ([[0.0, 0.0], [0.0, 0.0]], 0.0),
    ],
)
def test_balance_loss_by_hand(counts: list[list[float]], loss: float) -> None:
    assert balance_loss(as_tensor(counts)).item() == pytest.approx(loss, rel=1e-9)


def test_balance_gradients() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    top = torch.rand(5, dtype=torch.float64, requires_grad=True)

    def counts(z: Tensor, t: Tensor) -> Tensor:
        return balance_counts([Routing(z, z, t)])

    assert torch.autograd.gradcheck(counts, (logits, top))
    hand_made = (torch.rand(2, 2, 3, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(balance_loss, (hand_made,))
    assert torch.autograd.gradgradcheck(balance_loss, (hand_made,))
