"""`MoALinear` against the formulas written out: every matrix formed, every expert apart."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from torch import Tensor, nn

from moa import MoAConfig, MoALinear, RoutingPosition, aux_loss, set_routing_position
from moa.layers.noise import uniform
from moa.layers.router import Routing, choose

METHODS = ("lora", "kadaptation", "multi_lora", "moa_lora", "moa_kron")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass
class Case:
    """A random layer and its tokens [B, T, D]."""

    layer: MoALinear
    x: Tensor
    keyed: bool

    @property
    def config(self) -> MoAConfig:
        return self.layer.config


@st.composite
def cases(draw: st.DrawFn) -> Case:
    method = draw(st.sampled_from(METHODS))
    ranks = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    mixes, routed = method not in METHODS[:2], method in METHODS[3:]
    router = draw(st.sampled_from(["cosine", "linear", "soft", "uniform"])) if routed else None
    chooses = router in ("cosine", "linear")
    kron = method in ("kadaptation", "moa_kron")
    config = MoAConfig(
        method=method,  # type: ignore[arg-type]
        ranks=ranks if mixes else ranks[:1],
        router=router,  # type: ignore[arg-type]
        router_dim=draw(st.integers(2, 6)),
        top_k=draw(st.integers(1, len(ranks))) if chooses else 1,
        gate_noise=draw(st.sampled_from([0.0, 1.0, 3.0])),
        shared_rank=draw(st.integers(0, 2)) if mixes else 0,
        balance="bias" if chooses and draw(st.booleans()) else "loss",
        balance_rate=0.03,
        kron_dim=draw(st.integers(1, 4)),
        kron_impl=draw(st.sampled_from(["factored", "dense"])) if kron else "factored",
    )
    dim, out = (config.kron_dim * draw(st.integers(1, 4)) for _ in range(2))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), dim)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layer = MoALinear(nn.Linear(dim, out, bias=draw(st.booleans())).double(), config)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(1.0 if name.endswith("temperature") else 0.0, 0.7)
        for name, buffer in layer.named_buffers():
            if name.endswith("balance_steps"):
                buffer.copy_(torch.randint(-9, 9, buffer.shape))
    return Case(layer, torch.randn(shape, dtype=torch.float64), draw(st.booleans()))


def reference(
    config: MoAConfig, given: dict[str, Tensor], base: nn.Linear, x: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """Output [N, O], auxiliary loss, and how clearly the last choice was made."""
    tokens = x.flatten(0, -2)
    y = tokens @ base.weight.T + (0 if base.bias is None else base.bias)
    gates, aux, margin = reference_gates(config, given, tokens, noise)
    names = [f"experts.{e}" for e in range(len(config.ranks or ()))]
    if config.shared_rank:
        names.append("shared_expert")
    for e, name in enumerate(names):
        update = tokens @ reference_matrix(config, given, name)
        routed = gates is not None and name != "shared_expert"
        y = y + (gates[:, e, None] * update if routed and gates is not None else update)
    return (y + given["bias"] if config.kronecker else y), aux, margin


def reference_matrix(config: MoAConfig, given: dict[str, Tensor], name: str) -> Tensor:
    """The [D, O] matrix of one expert."""
    if not config.kronecker:
        return (given[f"{name}.up"] @ given[f"{name}.down"]).T
    left, right = given[f"{name}.left"], given[f"{name}.right"]
    u, v = given["kron_rule.left"], given["kron_rule.right"]
    terms = [torch.kron(torch.outer(u[p], v[p]), left[p] @ right[p]) for p in range(len(u))]
    return torch.stack(terms).sum(0)


def reference_gates(
    config: MoAConfig, given: dict[str, Tensor], tokens: Tensor, noise: Tensor | None
) -> tuple[Tensor | None, Tensor, float]:
    nothing = torch.zeros((), dtype=torch.float64)
    number = len(config.ranks or ())
    if not config.mixes:
        return None, nothing, math.inf
    if config.router == "uniform":
        weights = given["router.logits"].exp()
        return (weights / weights.sum()).expand(len(tokens), -1), nothing, math.inf
    if config.router == "linear":
        logits = tokens @ given["router.embed"]
    else:
        z = tokens @ given["router.proj.weight"].T + given["router.proj.bias"]
        embed = given["router.embed"]
        cosine = (z @ embed) / (z.norm(dim=1, keepdim=True) * embed.norm(dim=0))
        logits = given["router.temperature"].clamp(max=math.log(100)).exp() * cosine
    clean = logits.exp() / logits.exp().sum(1, keepdim=True)
    noisy = logits if noise is None else logits + noise
    chosen = noisy.exp() / noisy.exp().sum(1, keepdim=True)
    kept = number if config.router == "soft" else config.top_k
    score = chosen.detach().clone()
    if config.balance == "bias":
        score += config.balance_rate * given["router.balance_steps"]
    rows = []
    for n in range(len(tokens)):
        best = sorted(range(number), key=lambda e: -score[n, e].item())[:kept]
        mask = torch.tensor([float(e in best) for e in range(number)], dtype=torch.float64)
        rows.append(chosen[n] * mask)
    gates = torch.stack(rows)
    ordered = score.sort(dim=1, descending=True).values
    margin = math.inf
    if kept < number:
        margin = (ordered[:, kept - 1] - ordered[:, kept]).min().item()
    aux = reference_aux(config, clean, gates) if config.balance == "loss" else nothing
    return gates, aux, margin


def reference_aux(config: MoAConfig, clean: Tensor, gates: Tensor) -> Tensor:
    top = gates.max(dim=1, keepdim=True).values
    number = clean.shape[1]
    load = (0.5 * (1 + torch.erf((clean - top) * number / math.sqrt(2)))).sum(0)
    squares = []
    for counts in (clean.sum(0), load):
        mean = counts.sum() / number
        squares.append(((counts - mean) ** 2).sum() / (number - 1) / (mean**2 + 1e-10))
    return config.aux_weight * 0.5 * (squares[0] + squares[1])


def close(fast: Tensor, slow: Tensor, tolerance: float, scale: float) -> None:
    """The error's norm, against the value's own and a tenth of the whole problem's."""
    error, norm = (fast.double() - slow).norm().item(), slow.norm().item()
    assert error <= tolerance * max(norm, 0.1 * scale), (error, norm, scale)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.filter_too_much])
@given(cases(), st.sampled_from(list(TOLERANCE)))
def test_value_and_every_gradient_equal_the_formulas(case: Case, dtype: torch.dtype) -> None:
    noises: list[Tensor | None] = []

    def noting(logits: Tensor, noise: Tensor | None, *others: object) -> Routing:
        noises.append(noise)
        return choose(logits, noise, *others)  # type: ignore[arg-type]

    layer, config = case.layer.to(dtype).train(), case.config
    set_routing_position(layer, RoutingPosition(3, 4, 5) if case.keyed else None)
    x = case.x.to(dtype).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moa.layers.layer.choose", noting)
        y = layer(x).flatten(0, -2)
    noise = noises[0] if noises else None
    assert (noise is not None) == (config.routed and config.gate_noise > 0)

    slow_x = x.detach().double().requires_grad_()
    state = layer.state_dict(keep_vars=True)
    trained = {name: t for name, t in state.items() if t.requires_grad}
    given_slow = {
        name: t.detach().double().requires_grad_(name in trained) for name, t in state.items()
    }
    base = nn.Linear(*layer.base.weight.T.shape, bias=layer.base.bias is not None).double()
    base.load_state_dict(layer.base.state_dict())
    slow_noise = None if noise is None else noise.double()
    slow_y, slow_aux, margin = reference(config, given_slow, base, slow_x, slow_noise)
    assume(margin > 1e-4)  # a tie may be broken either way

    tolerance, direction = TOLERANCE[dtype], torch.randn_like(slow_y)
    fast_aux = aux_loss(layer)
    close(y.detach(), slow_y.detach(), tolerance, slow_y.abs().norm().item())
    close(fast_aux.detach(), slow_aux.detach(), tolerance, 1e-2)
    fast = torch.autograd.grad(
        (y * direction.to(dtype)).sum() + 30 * fast_aux, [x, *trained.values()], allow_unused=True
    )
    slow = torch.autograd.grad(
        (slow_y * direction).sum() + 30 * slow_aux,
        [slow_x, *(given_slow[name] for name in trained)],
        allow_unused=True,
    )
    scale = max(gradient.norm().item() for gradient in slow if gradient is not None)
    for name, one, other in zip(["x", *trained], fast, slow, strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        assert one is not None, f"{name} got no gradient"
        close(one, zero.expand_as(one) if other is None else other, tolerance, scale)


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("method", ["lora", "moa_lora", "moa_kron", "kadaptation"])
def test_dropout_of_rank_columns(method: str, keyed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mask given, a column that is dropped for a token is as if its factors were zero."""
    torch.manual_seed(0)
    config = MoAConfig(method=method, kron_dim=4, router_dim=3, expert_dropout=0.5, gate_noise=0.0)  # type: ignore[arg-type]
    layer = MoALinear(nn.Linear(8, 12).double(), config).train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    set_routing_position(layer, RoutingPosition(0, 0, 0) if keyed else None)
    drawn: list[Tensor] = []

    def noting(*given: object) -> Tensor:
        drawn.append(uniform(*given))  # type: ignore[arg-type]
        return drawn[-1]

    monkeypatch.setattr("moa.layers.layer.uniform", noting)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    y = layer(x).flatten(0, 1)
    (values,) = drawn
    ranks = list(layer.ranks)
    assert values.shape == (6, sum(ranks))
    kept = values > 0.5
    assert kept.any()
    assert not kept.all()
    plain = {n: t.detach().clone() for n, t in layer.state_dict().items()}
    for n in range(6):
        masked, column = dict(plain), 0
        for e, rank in enumerate(ranks):
            mask = kept[n, column : column + rank].double() / 0.5
            column += rank
            part, shape = ("left", (1, 1, rank)) if config.kronecker else ("down", (rank, 1))
            masked[f"experts.{e}.{part}"] = plain[f"experts.{e}.{part}"] * mask.view(shape)
        wanted, _, _ = reference(
            config.resolved(), masked, layer.base, x.flatten(0, 1)[n, None], None
        )
        torch.testing.assert_close(y[n], wanted[0], rtol=1e-10, atol=1e-10)


def test_element_dropout_of_dense_experts_is_one_mask_for_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    config = MoAConfig(
        method="moa_kron", kron_dim=4, router_dim=3, expert_dropout=0.5, kron_impl="dense",
        gate_noise=0.0,
    )  # fmt: skip
    layer = MoALinear(nn.Linear(8, 12), config).train()
    x = torch.randn(4, 3, 8)
    seen = []

    def noting(tokens: Tensor, matrices: list[Tensor], gates: Tensor | None) -> Tensor:
        seen.append(torch.stack(matrices))
        return sum(gates[:, e, None] * (tokens @ m) for e, m in enumerate(matrices))  # type: ignore[index, return-value]

    monkeypatch.setattr("moa.layers.layer.dense_delta", noting)
    for first, part in ((0, x), (0, x[:2]), (2, x[2:])):
        set_routing_position(layer, RoutingPosition(0, 7, first))
        layer(part)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])  # whatever part of the batch a rank has
    formed = torch.stack([_formed(layer, e) for e in range(4)])
    kept = seen[0] != 0
    torch.testing.assert_close(seen[0], 2 * formed * kept)
    assert 0.4 < kept.double().mean() < 0.6
    assert not torch.equal(kept[0], kept[1])
    set_routing_position(layer, RoutingPosition(0, 8, 0))
    layer(x)
    assert not torch.equal(seen[3] != 0, kept)
    layer.eval()
    layer(x)
    torch.testing.assert_close(seen[4], formed)


def _formed(layer: MoALinear, number: int) -> Tensor:
    return reference_matrix(
        layer.config, dict(layer.named_parameters()), f"experts.{number}"
    ).detach()


def test_bfloat16_routes_as_if_the_rounded_numbers_were_wide() -> None:
    """Same choices and gates, to the bit, as a float32 layer with the same rounded numbers."""
    torch.manual_seed(0)
    decided: list[Routing] = []

    def noting(*given: object) -> Routing:
        decided.append(choose(*given))  # type: ignore[arg-type]
        return decided[-1]

    for method in ("moa_lora", "moa_kron"):
        decided.clear()
        config = MoAConfig(method=method, kron_dim=8, router_dim=16)  # type: ignore[arg-type]
        narrow = MoALinear(nn.Linear(64, 48), config).bfloat16().eval()
        with torch.no_grad():
            for parameter in narrow.parameters():
                parameter.normal_(0, 0.5)
        wide = MoALinear(nn.Linear(64, 48), config).eval()
        wide.load_state_dict(narrow.state_dict())
        x = torch.randn(5, 7, 64).bfloat16()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moa.layers.layer.choose", noting)
            y, expected = narrow(x), wide(x.float())
        assert decided[0].gates.dtype == torch.float32
        assert torch.equal(decided[0].gates > 0, decided[1].gates > 0)
        torch.testing.assert_close(decided[0].gates, decided[1].gates, rtol=1e-6, atol=1e-6)
        assert y.dtype == torch.bfloat16
        assert (y.float() - expected).norm() < 0.02 * expected.norm()
