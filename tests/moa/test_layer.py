import copy
import math
import pickle
import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moa import MoAConfig, MoAConfigError, MoALinear, aux_loss, inject, routing_stats
from moa.layers.experts import KroneckerRule
from moa.layers.layer import moa_layers
from moa.layers.noise import RoutingPosition
from moa.layers.router import Routing, UniformRouter, balance_counts, choose
from moa.model.routing import set_routing_position
from tests.support.moa_fixtures import (
    ADAPTERS,
    DIM,
    METHODS,
    MIXTURES,
    dense_delta,
    dense_update,
    images,
    position,
    small_config,
    stir,
    tiny_vit,
)


def lone_layer(method: str, dim_out: int = 24, **changes: object) -> MoALinear:
    torch.manual_seed(0)
    return MoALinear(nn.Linear(DIM, dim_out), small_config(method, **changes))


def injected(method: str, **changes: object) -> nn.Module:
    """A stirred float64 model in training mode, at the start of a global batch of six."""
    model = tiny_vit().double()
    inject(model, small_config(method, **changes))
    stir(model)
    set_routing_position(model, position())
    return model.train()


def tokens(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, DIM, generator=generator, dtype=dtype)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """A list that receives the noise given to each layer's choice, in the order of the calls."""
    received: list[Tensor | None] = []

    def noting(logits: Tensor, noise: Tensor | None, *others: object) -> Routing:
        received.append(noise)
        return choose(logits, noise, *others)  # type: ignore[arg-type]

    monkeypatch.setattr("moa.layers.layer.choose", noting)
    return received


def gates_of(layer: MoALinear, flat: Tensor) -> Tensor | None:
    """Noise-free gates of tokens [N, D]."""
    if isinstance(layer.router, UniformRouter):
        return layer.router().expand(len(flat), -1)
    if layer.router is None:
        return None
    logits = layer.router(flat @ layer.router.weight.T)
    return choose(logits, None, layer.config.experts_kept).gates


def scalar_loss(counts: Tensor) -> float:
    """The balance loss of counts [L, 2, E] in plain Python."""
    rows = [row for layer in counts.tolist() for row in layer]
    return sum(
        0.5 * statistics.variance(row) / (statistics.fmean(row) ** 2 + 1e-10) for row in rows
    )


# The start.


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["lora", "moa_lora"])
def test_a_new_lora_layer_equals_its_base(method: str, training: bool) -> None:
    layer = lone_layer(method).train(training)
    x = tokens(4, 5)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("method", ["kadaptation", "moa_kron"])
@pytest.mark.parametrize(("dim", "dim_out", "kron_dim"), [(16, 24, 8), (256, 768, 64)])
def test_a_new_kronecker_layer_nearly_equals_its_base(
    method: str, dim: int, dim_out: int, kron_dim: int
) -> None:
    """|y_b| <= sum_p |v_p[b]| |u_p| |x| |left| |right|, entry by entry with the initial bounds."""
    torch.manual_seed(0)
    config = MoAConfig(method=method, kron_dim=kron_dim, router_dim=8)  # type: ignore[arg-type]
    layer = MoALinear(nn.Linear(dim, dim_out), config)
    x = torch.randn(6, dim)
    delta = layer(x) - layer.base(x)
    assert delta.abs().max() > 0

    def xavier(rank: int, width: int) -> float:
        return math.sqrt(2.0) * math.sqrt(6.0 / (rank + width // kron_dim))

    factors = max(r * xavier(r, dim) * xavier(r, dim_out) for r in config.resolved().ranks or ())
    bound = kron_dim * 0.01 * 0.01 * factors * x.abs().sum(-1, keepdim=True)
    assert (delta.abs() <= bound).all()
    assert delta.norm() < 0.01 * layer.base(x).norm()


# The formula.


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 2)])
@pytest.mark.parametrize("method", ADAPTERS)
def test_output_equals_the_dense_formula(method: str, shape: tuple[int, ...]) -> None:
    layer = lone_layer(method).double().eval()
    stir(layer, scale=1.0)
    x = tokens(*shape, dtype=torch.float64)
    flat = x.reshape(-1, DIM)
    gates = gates_of(layer, flat)
    rule = getattr(layer, "kron_rule", None)
    matrices = [dense_update(expert, rule) for expert in layer.experts]  # type: ignore[arg-type]
    delta = dense_delta(flat, matrices, gates)
    if layer.config.kronecker:
        assert layer.bias is not None
        delta = delta + layer.bias
    else:
        assert layer.bias is None
    expected = nn.functional.linear(x, layer.base.weight, layer.base.bias)
    expected = expected + delta.view(*shape, 24)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    assert delta.norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_lone_token(method: str) -> None:
    """As one of a batch of one, in training too."""
    layer, x = lone_layer(method), torch.randn(DIM)
    outputs = []
    for tokens in (x, x.view(1, DIM)):
        set_routing_position(layer, position())
        outputs.append(layer(tokens))
    assert torch.equal(outputs[0], outputs[1][0])


@pytest.mark.parametrize("method", ADAPTERS)
def test_base_without_bias(method: str) -> None:
    config = small_config(method)
    layer = MoALinear(nn.Linear(DIM, 24, bias=False), config)
    assert layer(tokens(2, 3)).shape == (2, 3, 24)


@pytest.mark.parametrize("method", ADAPTERS)
def test_no_images(method: str) -> None:
    layer = lone_layer(method)
    for x in (tokens(0, 5), tokens(0)):
        y = layer(x)
        assert y.shape == (*x.shape[:-1], 24)
        y.sum().backward()
    assert aux_loss(layer).item() == 0


@pytest.mark.parametrize("method", ADAPTERS)
def test_only_adapters_receive_gradients(method: str) -> None:
    model = injected(method)
    logits = model(images(6, dtype=torch.float64))
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2] * 2)).backward()
    adapted = [f"{path}." for path, _ in moa_layers(model)]
    trained = 0
    for name, parameter in model.named_parameters():
        beside = any(name.startswith(path) for path in adapted) and ".base." not in name
        trains = beside or name.startswith(("kron_rule.", "head."))
        assert parameter.requires_grad == trains, name
        assert (parameter.grad is not None) == trains, name
        if parameter.grad is not None:
            assert parameter.grad.count_nonzero() > 0, name
            trained += 1
    assert trained > 4


def test_half_precision_layer() -> None:
    for method in ADAPTERS:
        layer = lone_layer(method).bfloat16()
        y = layer(tokens(4, 5, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16
        loss = y.float().sum() + aux_loss(layer)
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("method", ["full", "linear"])
def test_methods_without_adapters_wrap_nothing(method: str) -> None:
    with pytest.raises(MoAConfigError, match=f"{method}.* does not wrap layers"):
        lone_layer(method)


def test_illegal_settings_are_refused() -> None:
    with pytest.raises(MoAConfigError, match="kron_dim: 7 does not divide the width 16"):
        lone_layer("moa_kron", kron_dim=7)
    with pytest.raises(MoAConfigError, match="top_k"):
        lone_layer("moa_kron", top_k=4)


def test_shape_of_the_layer_is_that_of_its_base() -> None:
    layer = lone_layer("moa_kron")
    assert (layer.in_features, layer.out_features) == (DIM, 24)
    assert "method=moa_kron, ranks=[1, 2, 3]" in repr(layer)


# The shared rule.


def test_a_lone_kronecker_layer_makes_its_own_rule() -> None:
    names = {name for name, _ in lone_layer("kadaptation").named_parameters()}
    assert {"kron_rule.left", "kron_rule.right"} <= names
    assert not any("kron_rule" in n for n, _ in lone_layer("lora").named_parameters())
    rule = KroneckerRule(8, torch.zeros(()))
    given = MoALinear(nn.Linear(DIM, 24), small_config("kadaptation"), rule)
    assert not any("kron_rule" in name for name, _ in given.named_parameters())


@pytest.mark.parametrize("lone", [False, True])
def test_copies_use_their_own_shared_rule(lone: bool) -> None:
    model = lone_layer("moa_kron") if lone else injected("moa_kron")
    model.eval()
    stir(model)
    x = tokens(4) if lone else images(4, dtype=torch.float64)
    before = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for parameter in twin.kron_rule.parameters():  # type: ignore[union-attr]
            parameter.zero_()
    assert torch.equal(model(x), before)
    without = copy.deepcopy(model)
    with torch.no_grad():
        for _, layer in moa_layers(without):
            for expert in layer.experts:
                expert.left.zero_()  # type: ignore[operator]
    assert not torch.equal(twin(x), before)
    torch.testing.assert_close(twin(x), without(x))  # no layer kept the old rule


def test_only_linear_layers_are_wrapped() -> None:
    base = nn.Conv1d(DIM, 24, 1)
    with pytest.raises(MoAConfigError, match=r"base: Conv1d; must be a torch\.nn\.Linear"):
        MoALinear(base, small_config("moa_lora"))  # type: ignore[arg-type]
    assert base.weight.requires_grad


@pytest.mark.parametrize("method", MIXTURES)
def test_a_copy_between_forward_and_loss(method: str) -> None:
    """The copy has no routing to balance, the original keeps its own."""
    layer = lone_layer(method)
    layer(tokens(2, 3))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.take_routing() is None
        assert torch.equal(other.eval()(tokens(2, 3)), copy.deepcopy(layer).eval()(tokens(2, 3)))
    assert (aux_loss(layer) > 0) == layer.config.routed


def test_the_rule_follows_a_change_of_dtype() -> None:
    model = injected("moa_kron").float()
    assert model(images(2)).dtype == torch.float32
    model.kron_rule.left.requires_grad_(True)  # type: ignore[union-attr]
    model(images(2)).sum().backward()
    assert model.kron_rule.left.grad.count_nonzero() > 0  # type: ignore[union-attr]


# Gate noise.


@pytest.mark.parametrize("method", MIXTURES)
def test_evaluation_has_no_noise_and_records_nothing(
    method: str, noise: list[Tensor | None]
) -> None:
    model = injected(method)
    model.eval()
    x = images(3, dtype=torch.float64)
    assert torch.equal(model(x), model(x))
    assert noise == [None] * len(noise)
    assert len(noise) == 4
    assert routing_stats(model) == {}
    assert aux_loss(model).item() == 0
    model.train()
    assert not torch.equal(model(x), model.eval()(x))


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize(("gate_noise", "ranks"), [(1.0, (1, 2)), (0.5, (1, 1, 1, 1, 1))])
def test_noise_is_normal_with_the_given_width(
    gate_noise: float, ranks: tuple[int, ...], keyed: bool, noise: list[Tensor | None]
) -> None:
    layer = lone_layer("moa_lora", gate_noise=gate_noise, ranks=ranks)
    set_routing_position(layer, position() if keyed else None)
    layer(tokens(200, 50))
    (drawn,) = noise
    assert drawn is not None
    assert drawn.shape == (10_000, len(ranks))
    std = gate_noise / len(ranks)
    assert drawn.std().item() == pytest.approx(std, rel=0.03)
    assert abs(drawn.mean().item()) < 0.03 * std
    within = (drawn.abs() < std).float().mean().item()
    assert within == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.02)


def test_noise_can_be_switched_off(noise: list[Tensor | None]) -> None:
    layer = lone_layer("moa_lora", gate_noise=0.0)
    layer(tokens(3, 4))
    assert noise == [None]


def test_noise_depends_on_seed_step_and_layer_only(noise: list[Tensor | None]) -> None:
    model = injected("moa_lora", blocks="all")
    drawn: dict[tuple[int, int, int], Tensor] = {}
    x = images(6, dtype=torch.float64)
    for seed, step in ((0, 0), (0, 1), (1, 0), (1, 11), (11, 1)):
        set_routing_position(model, position(step=step, seed=seed))
        for repeat in range(2):
            noise.clear()
            torch.manual_seed(repeat)
            state = torch.get_rng_state()
            model(x)
            assert torch.equal(torch.get_rng_state(), state)  # draws nothing from torch's own
            for layer, values in enumerate(noise):
                assert values is not None
                known = drawn.setdefault((seed, step, layer), values)
                assert torch.equal(known, values)
    assert len(drawn) == 5 * 4
    assert len({values.flatten()[0].item() for values in drawn.values()}) == 5 * 4


def test_without_position_noise_is_torchs_own() -> None:
    model = injected("moa_lora")
    set_routing_position(model, None)
    x = images(2, dtype=torch.float64)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def taken_counts(model: nn.Module) -> Tensor | None:
    """Balance counts [L, 2, E] of the last training forward; None if nothing routes."""
    taken = [layer.take_routing() for _, layer in moa_layers(model)]
    routings = [routing for routing in taken if routing is not None]
    return balance_counts(routings).detach() if routings else None


@pytest.mark.parametrize("shares", [(3, 3), (1, 2, 3), (6,), (1,) * 6])
@pytest.mark.parametrize("method", MIXTURES)
def test_a_batch_split_over_ranks_is_routed_alike(method: str, shares: tuple[int, ...]) -> None:
    model = injected(method)
    x = images(6, dtype=torch.float64)
    whole = model(x)
    counts = taken_counts(model)
    parts, part_counts, first = [], [], 0
    for share in shares:
        set_routing_position(model, position(first=first))
        parts.append(model(x[first : first + share]))
        part_counts.append(taken_counts(model))
        first += share
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-10, atol=1e-10)
    if counts is not None:
        total = torch.stack([part for part in part_counts if part is not None]).sum(0)
        torch.testing.assert_close(total, counts, rtol=1e-10, atol=1e-10)
    set_routing_position(model, position(first=0))
    assert not torch.allclose(model(x[3:]), whole[3:])  # the place matters


@pytest.mark.parametrize("changes", [{}, {"expert_dropout": 0.4}])
def test_windows_of_an_image_do_not_count_as_images(changes: dict[str, float]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, num_classes=3, drop_path_rate=0.0,
        embed_dim=16, depths=(2, 2), num_heads=(2, 2),
    ).double()  # fmt: skip
    inject(model, small_config("moa_lora", gate_noise=4.0, **changes))
    stir(model)
    x = torch.randn(3, 3, 56, 56, dtype=torch.float64)
    results = []
    for pieces in ((0, 3), (0, 1, 3)):
        parts = []
        for first, last in pairwise(pieces):
            set_routing_position(model, RoutingPosition(1, 2, first, last - first))
            parts.append(model(x[first:last]))
        results.append(torch.cat(parts))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_a_model_may_move_after_its_position_was_set() -> None:
    model = injected("moa_lora")
    set_routing_position(model, position())
    model.to("meta")
    assert model(images(2, dtype=torch.float64).to("meta")).device.type == "meta"


# Activation checkpointing.


def gradients(
    model: nn.Module, forward: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    set_routing_position(model, position(step=5))
    logits = forward(images(6, dtype=torch.float64))
    aux = aux_loss(model)
    (logits.square().sum() + 100 * aux).backward()
    trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), aux.detach(), trained


@pytest.mark.parametrize("method", MIXTURES)
def test_activation_checkpointing_changes_nothing(method: str) -> None:
    """Without saving torch's random state: the recomputation draws the same keyed noise."""
    model = injected(method)
    logits, aux, plain = gradients(model, model)
    torch.manual_seed(99)
    for block in model.blocks:  # type: ignore[union-attr]
        block.forward = partial(  # type: ignore[method-assign]
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    again_logits, again_aux, checkpointed = gradients(model, model)
    assert torch.equal(again_logits, logits)
    assert torch.equal(again_aux, aux)
    assert aux > 0
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-10, atol=1e-12)


def test_a_balance_that_would_train_nothing_is_refused() -> None:
    """Reentrant checkpointing runs the forward without a graph."""
    layer = lone_layer("moa_lora")
    x = tokens(2, 3).requires_grad_()
    checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"\.router.*use_reentrant=False"):
        aux_loss(layer)
    with torch.no_grad():
        layer(x)
        assert aux_loss(layer) > 0
        layer(x)
    assert layer.router is not None
    layer.router.requires_grad_(False)
    assert aux_loss(layer) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_the_graph_outlives_backward(checkpointing: bool) -> None:
    """A recomputation leaves no counts behind: they would hold its activations."""
    model = injected("moa_kron")
    model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
    _, aux, _ = gradients(model, model)
    assert aux > 0
    assert aux_loss(model).item() == 0
    assert not aux_loss(model).requires_grad
    gradients(model, model)
    copy.deepcopy(model)  # would refuse a tensor with a graph


# The balance loss.


def hand_made(layers: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(layers, 2, 3, generator=generator, dtype=torch.float64) * 40


def test_aux_loss_of_hand_made_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = injected("moa_kron", blocks=(0, 1, 3), aux_weight=0.7)
    model(images(2, dtype=torch.float64))
    counts = hand_made()
    monkeypatch.setattr("moa.model.routing.balance_counts", lambda _: counts)
    wanted = 0.7 * scalar_loss(counts)
    assert aux_loss(model).item() == pytest.approx(wanted, rel=1e-12)


def test_counts_are_summed_over_ranks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = injected("moa_kron", blocks=(0, 1, 3), aux_weight=0.7)
    model(images(2, dtype=torch.float64))
    counts, others, seen = hand_made(), torch.rand(3, 2, 3, dtype=torch.float64), []
    monkeypatch.setattr("moa.model.routing.balance_counts", lambda _: counts)

    def sum_over_ranks(local: Tensor) -> Tensor:
        seen.append(local)
        return local + others

    loss = aux_loss(model, sum_over_ranks)
    assert len(seen) == 1
    assert seen[0].shape == (3, 2, 3)
    assert torch.equal(seen[0], counts)
    assert loss.item() == pytest.approx(0.7 * scalar_loss(counts + others), rel=1e-12)


def test_gradients_of_ranks_add_up_to_those_of_the_whole_batch() -> None:
    """The loss is that of the global batch, so a rank's share of its gradient is plain addition."""
    model = injected("moa_kron")
    x = images(6, dtype=torch.float64)
    router = [p for name, p in model.named_parameters() if "router" in name]

    def run(first: int, last: int) -> None:
        set_routing_position(model, position(first=first))
        model(x[first:last])

    run(0, 6)
    whole = aux_loss(model)
    wanted = torch.autograd.grad(whole, router)
    totals = [torch.zeros_like(p) for p in router]
    for mine, other in (((0, 2), (2, 6)), ((2, 6), (0, 2))):
        run(*other)
        remote = taken_counts(model)
        assert remote is not None
        run(*mine)
        loss = aux_loss(model, lambda local, remote=remote: local + remote)
        assert loss.item() == pytest.approx(whole.item(), rel=1e-10)
        for total, grad in zip(totals, torch.autograd.grad(loss, router), strict=True):
            total += grad
    for total, grad in zip(totals, wanted, strict=True):
        torch.testing.assert_close(total, grad, rtol=1e-8, atol=1e-12)
    assert max(grad.abs().max().item() for grad in wanted) > 0


@pytest.mark.parametrize("method", MIXTURES)
def test_aux_loss_of_a_forward_is_consumed_once(method: str) -> None:
    model = injected(method)
    model(images(6, dtype=torch.float64))
    first = aux_loss(model)
    assert first.item() > 0
    assert first.requires_grad
    second = aux_loss(model, lambda _: pytest.fail("there is nothing to sum"))
    assert (second.item(), second.shape, second.requires_grad) == (0, (), False)
    model(images(6, dtype=torch.float64))
    assert aux_loss(model).item() == first.item()


@pytest.mark.parametrize("method", METHODS[:4])
def test_nothing_to_balance_without_a_router(method: str) -> None:
    model = injected(method)
    model(images(2, dtype=torch.float64))
    assert aux_loss(model).item() == 0
    assert routing_stats(model) == {}


def test_only_the_last_forward_counts() -> None:
    model = injected("moa_lora")
    model(images(6, seed=7, dtype=torch.float64))
    model(images(6, dtype=torch.float64))
    both = aux_loss(model)
    model(images(6, dtype=torch.float64))
    assert aux_loss(model).item() == both.item()


# Statistics.


@pytest.mark.parametrize("top_k", [1, 2])
def test_routing_stats(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = injected("moa_kron", top_k=top_k)
    decisions = []

    def noting(*given: object) -> Routing:
        decisions.append(choose(*given))  # type: ignore[arg-type]
        return decisions[-1]

    monkeypatch.setattr("moa.layers.layer.choose", noting)
    model(images(6, dtype=torch.float64))
    stats = routing_stats(model)
    assert list(stats) == ["blocks.0.attn.qkv", "blocks.2.attn.qkv"]
    for (name, values), decided in zip(stats.items(), decisions, strict=True):
        assert sorted(values) == ["entropy", "load", "max_prob", "temperature"]
        assert not any(value.requires_grad for value in values.values())
        rows = decided.probs.tolist()
        shares = [
            sum(gates[e] > 0 for gates in decided.gates.tolist()) / len(rows) for e in range(3)
        ]
        assert values["load"].tolist() == pytest.approx(shares)
        assert sum(shares) == pytest.approx(top_k)
        entropies = [-sum(p * math.log(p) for p in row) for row in rows]
        assert values["entropy"].item() == pytest.approx(statistics.fmean(entropies))
        largest = statistics.fmean(max(row) for row in rows)
        assert values["max_prob"].item() == pytest.approx(largest)
        router = model.get_submodule(name).router
        assert values["temperature"].item() == router.temperature.item()  # type: ignore[union-attr]


def test_stats_stay_those_of_training() -> None:
    model = injected("moa_lora")
    model(images(6, dtype=torch.float64))
    before = routing_stats(model)
    model.eval()(images(4, seed=8, dtype=torch.float64))
    after = routing_stats(model)
    for name, values in before.items():
        for key, value in values.items():
            assert torch.equal(after[name][key], value)
