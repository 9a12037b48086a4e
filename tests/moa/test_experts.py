import copy
import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import moa.layers.experts
from moa.layers.experts import (
    KroneckerExpert,
    KroneckerRule,
    LoRAExpert,
    _Regrouped,
    _spread_at_once,
    _spread_by_token,
    _word,
    gate_columns,
    kronecker_delta,
    kronecker_matrix,
    lora_delta,
    lora_down,
    overlap,
)
from tests.support.moa_fixtures import dense_delta, dense_update

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
RANKS = st.lists(st.integers(1, 4), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from(list(TOLERANCE))


def randomised(module: nn.Module) -> nn.Module:
    """Every factor of order one, so that each matters."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def lora_experts(
    dim_in: int, dim_out: int, ranks: Sequence[int], dtype: torch.dtype
) -> list[LoRAExpert]:
    like = torch.zeros((), dtype=dtype)
    return [randomised(LoRAExpert(dim_in, dim_out, r, like)) for r in ranks]  # type: ignore[misc]


def kronecker_experts(
    dims: tuple[int, int, int], ranks: Sequence[int], dtype: torch.dtype
) -> tuple[list[KroneckerExpert], KroneckerRule]:
    like, (p, rows, columns) = torch.zeros((), dtype=dtype), dims
    experts = [randomised(KroneckerExpert(p * rows, p * columns, r, p, like)) for r in ranks]
    return experts, randomised(KroneckerRule(p, like))  # type: ignore[return-value]


def parameters(experts: Sequence[nn.Module], rule: nn.Module | None) -> list[Tensor]:
    modules = [*experts, rule] if rule is not None else experts
    return [p for module in modules for p in module.parameters()]


def assert_close(fast: Tensor, slow: Tensor, tolerance: float, scale: float = 0.0) -> None:
    """Relative to the norm of `slow`, or to `scale` if that is larger: what cancelled in a sum
    leaves the rounding of its terms behind."""
    assert fast.shape == slow.shape
    error, norm = (fast.double() - slow).norm().item(), slow.norm().item()
    assert error <= tolerance * max(norm, scale), (error, norm, scale)


def fast_lora(x: Tensor, experts: Sequence[LoRAExpert], gates: Tensor | None) -> Tensor:
    columns = gate_columns(gates, [len(e.down) for e in experts])
    return lora_delta(x @ lora_down(experts).T, experts, columns)


def fast_kronecker(
    x: Tensor, experts: Sequence[KroneckerExpert], gates: Tensor | None, rule: KroneckerRule
) -> Tensor:
    columns = gate_columns(gates, [e.left.shape[2] for e in experts])
    return kronecker_delta(x, experts, columns, rule)


def formed_kronecker(
    x: Tensor, experts: Sequence[KroneckerExpert], gates: Tensor | None, rule: KroneckerRule
) -> Tensor:
    return moa.layers.experts.dense_delta(x, [kronecker_matrix(e, rule) for e in experts], gates)


def check_against_dense(
    x: Tensor,
    gates: Tensor | None,
    experts: Sequence[LoRAExpert] | Sequence[KroneckerExpert],
    rule: KroneckerRule | None,
    kronecker: Callable[..., Tensor] = fast_kronecker,
) -> None:
    """Value and every gradient equal those of the dense formula, evaluated in float64."""
    tolerance = TOLERANCE[x.dtype]
    slow_experts, slow_rule = copy.deepcopy((experts, rule))
    for module in (*slow_experts, slow_rule):
        if module is not None:
            module.double()
    slow_x = x.detach().double().requires_grad_()
    slow_gates = None if gates is None else gates.detach().double().requires_grad_()

    matrices = [dense_update(expert, slow_rule) for expert in slow_experts]
    slow = dense_delta(slow_x, matrices, slow_gates)
    delta = fast_lora if rule is None else partial(kronecker, rule=rule)
    fast = delta(x, experts, gates)  # type: ignore[operator]
    assert fast.dtype == x.dtype
    terms = dense_delta(
        slow_x.abs(), [m.abs() for m in matrices], None if slow_gates is None else slow_gates.abs()
    )
    assert_close(fast, slow, tolerance, 0.1 * terms.norm().item())

    direction = torch.randn_like(slow)
    extra = [] if gates is None else [gates]
    fast_grads = torch.autograd.grad(
        fast, [x, *extra, *parameters(experts, rule)], direction.to(x.dtype)
    )
    slow_extra = [] if slow_gates is None else [slow_gates]
    slow_grads = torch.autograd.grad(
        slow, [slow_x, *slow_extra, *parameters(slow_experts, slow_rule)], direction
    )
    assert len(fast_grads) == len(slow_grads) >= 3
    largest = max(grad.norm().item() for grad in slow_grads)
    for fast_grad, slow_grad in zip(fast_grads, slow_grads, strict=True):
        assert_close(fast_grad, slow_grad, tolerance, 0.1 * largest)


def slow_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Of two factors [r, D]."""
    total = torch.stack([(x @ y) ** 2 for x in a for y in b]).sum()
    return total / ((a**2).sum() * (b**2).sum())


@pytest.mark.parametrize("kind", ["lora", "kronecker"])
def test_overlap_is_summed_over_pairs_and_layers(kind: str) -> None:
    ranks, layers, slow = (2, 1, 3), [], []
    for width in (12, 18):
        if kind == "lora":
            experts: list = lora_experts(width, 9, ranks, torch.float64)
            factors = [[e.down] for e in experts]
        else:
            experts, _ = kronecker_experts((3, width // 3, 2), ranks, torch.float64)
            factors = [[left.T for left in e.left] for e in experts]
        layers.append(experts)
        pairs = [slow_overlap(a, b) for i, x in enumerate(factors) for y in factors[:i]
                 for a, b in zip(x, y, strict=True)]  # fmt: skip
        slow.append(torch.stack(pairs).sum() / len(factors[0]))
    moved = [e.down if kind == "lora" else e.left for experts in layers for e in experts]
    given, wanted = overlap(layers), slow[0] + slow[1]
    torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(value, moved) for value in (given, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    same = lora_experts(5, 5, (1,), torch.bfloat16) * 3
    assert overlap([same]).item() == pytest.approx(3.0), "one for each pair of equal directions"


def random_gates(tokens: int, experts: int, kind: str, dtype: torch.dtype) -> Tensor | None:
    """None, dense weights, or zero but for one expert a token."""
    if kind == "none":
        return None
    gates = torch.randn(tokens, experts, dtype=dtype)
    if kind == "one":
        gates *= nn.functional.one_hot(torch.randint(experts, (tokens,)), experts)
    return gates.requires_grad_()


KINDS = st.sampled_from(["none", "dense", "one"])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), RANKS, st.integers(1, 6), KINDS, DTYPES, SEEDS)
def test_lora_equals_dense_formula(
    dim_in: int,
    dim_out: int,
    ranks: list[int],
    tokens: int,
    kind: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(tokens, dim_in, dtype=dtype, requires_grad=True)
    gates = random_gates(tokens, len(ranks), kind, dtype)
    check_against_dense(x, gates, lora_experts(dim_in, dim_out, ranks, dtype), None)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    RANKS,
    st.integers(1, 6),
    KINDS,
    DTYPES,
    SEEDS,
)
def test_kronecker_equals_dense_formula(
    dims: tuple[int, int, int],
    ranks: list[int],
    tokens: int,
    kind: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    experts, rule = kronecker_experts(dims, ranks, dtype)
    x = torch.randn(tokens, dims[0] * dims[1], dtype=dtype, requires_grad=True)
    gates = random_gates(tokens, len(ranks), kind, dtype)
    check_against_dense(x, gates, experts, rule)
    check_against_dense(x, gates, experts, rule, formed_kronecker)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_both_kinds_at_the_paper_ranks(dtype: torch.dtype) -> None:
    """P = 64 and ranks 1, 2, 4, 8 with the initial scale of all factors."""
    torch.manual_seed(0)
    like, ranks = torch.zeros((), dtype=dtype), (1, 2, 4, 8)
    rule = KroneckerRule(64, like)
    kron = [KroneckerExpert(128, 192, r, 64, like) for r in ranks]
    lora = lora_experts(128, 192, ranks, dtype)
    x = torch.randn(10, 128, dtype=dtype, requires_grad=True)
    gates = torch.rand(10, 4, dtype=dtype, requires_grad=True)
    check_against_dense(x, gates, kron, rule)
    check_against_dense(x, gates, lora, None)


@pytest.mark.parametrize("gated", [False, True])
def test_no_tokens(gated: bool) -> None:
    experts, rule = kronecker_experts((4, 2, 3), (1, 2), torch.float32)
    lora = lora_experts(8, 12, (1, 2), torch.float32)
    for delta, used in ((fast_lora, lora), (partial(fast_kronecker, rule=rule), experts)):
        x = torch.zeros(0, 8, requires_grad=True)
        y = delta(x, used, torch.zeros(0, 2) if gated else None)  # type: ignore[operator]
        assert y.shape == (0, 12)
        leaves = [x, *parameters(used, None)]
        for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
            assert torch.equal(grad, torch.zeros_like(leaf))


def test_tokens_need_not_be_contiguous() -> None:
    torch.manual_seed(0)
    experts, rule = kronecker_experts((4, 2, 3), (1, 2), torch.float64)
    wide = torch.randn(16, 5, dtype=torch.float64)
    x = wide.T[:, 3:11].detach().requires_grad_()
    assert not x.is_contiguous()
    check_against_dense(x, None, experts, rule)
    check_against_dense(x, None, lora_experts(8, 12, (1, 2), torch.float64), None)


def test_half_precision_keeps_its_dtype_with_wide_gates() -> None:
    torch.manual_seed(0)
    experts, rule = kronecker_experts((4, 2, 3), (1, 2), torch.bfloat16)
    lora = lora_experts(8, 12, (1, 2), torch.bfloat16)
    x, gates = torch.randn(5, 8, dtype=torch.bfloat16), torch.rand(5, 2)
    for y, matrices in (
        (fast_lora(x, lora, gates), [dense_update(e) for e in lora]),
        (fast_kronecker(x, experts, gates, rule), [dense_update(e, rule) for e in experts]),
    ):
        assert y.dtype == torch.bfloat16
        slow = dense_delta(x.double(), [m.double() for m in matrices], gates.double())
        assert_close(y, slow, 0.02)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("kind", ["lora", "kronecker"])
def test_no_dense_matrix_is_formed(kind: str) -> None:
    """Forward and backward stay far below the D x O numbers of one update."""
    dim, ranks = 512, (1, 2)
    experts, rule = kronecker_experts((8, dim // 8, dim // 8), ranks, torch.float32)
    lora = lora_experts(dim, dim, ranks, torch.float32)
    x, gates = torch.randn(2, dim, requires_grad=True), torch.rand(2, 2)
    with LargestTensor() as largest:
        if kind == "lora":
            fast_lora(x, lora, gates).sum().backward()
        else:
            fast_kronecker(x, experts, gates, rule).sum().backward()
    assert 0 < largest.numel <= 8 * dim < dim * dim


@pytest.mark.parametrize("rank", [1, 4])
def test_lora_starts_from_zero_up_and_normal_down(rank: int) -> None:
    torch.manual_seed(0)
    expert = LoRAExpert(20_000, 30, rank, torch.zeros(()))
    assert [tuple(p.shape) for p in (expert.down, expert.up)] == [(rank, 20_000), (30, rank)]
    assert not expert.up.any()
    assert expert.down.std().item() == pytest.approx(1 / rank, rel=0.03)
    assert abs(expert.down.mean().item()) < 0.03 / rank
    assert fast_lora(torch.randn(3, 20_000), [expert], None).count_nonzero() == 0


def test_rule_starts_within_a_hundredth() -> None:
    torch.manual_seed(0)
    rule = KroneckerRule(64, torch.zeros(()))
    for factor in (rule.left, rule.right):
        assert factor.shape == (64, 64)
        assert 0.0099 < factor.abs().max().item() <= 0.01
        assert factor.std().item() == pytest.approx(0.01 / math.sqrt(3), rel=0.05)
    assert not torch.equal(rule.left, rule.right)


@pytest.mark.parametrize(("dim_in", "dim_out", "rank"), [(64, 192, 1), (64, 192, 8), (256, 128, 3)])
def test_kronecker_starts_from_xavier(dim_in: int, dim_out: int, rank: int) -> None:
    """PyTorch's own Xavier, gain sqrt 2, of one small matrix gives the bound."""
    torch.manual_seed(0)
    expert = KroneckerExpert(dim_in, dim_out, rank, 32, torch.zeros(()))
    assert expert.left.shape == (32, dim_in // 32, rank)
    assert expert.right.shape == (32, rank, dim_out // 32)
    for factor in (expert.left, expert.right):
        small = torch.empty(factor.shape[1:])
        drawn = torch.cat(
            [nn.init.xavier_uniform_(small, math.sqrt(2)).flatten().clone() for _ in range(2000)]
        )
        assert factor.abs().max().item() <= drawn.abs().max().item() * 1.01
        assert factor.std().item() == pytest.approx(drawn.std().item(), rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_take_dtype_and_device(dtype: torch.dtype) -> None:
    like = torch.zeros((), dtype=dtype, device="meta")
    modules = [LoRAExpert(8, 8, 2, like), KroneckerExpert(8, 8, 2, 4, like), KroneckerRule(4, like)]
    for module in modules:
        for parameter in module.parameters():
            assert (parameter.dtype, parameter.device.type) == (dtype, "meta")
            assert parameter.requires_grad


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_regrouped_whatever_their_width(dtype: torch.dtype, width: int) -> None:
    """Also those that begin in the middle of a word, or whose numbers do not lie side by side."""
    source = torch.randn(5, 3, 9).to(dtype)
    cases = [
        source[:, :, :width].contiguous(),
        source[:, :, :width],
        source[:, :, 1 : 1 + width],
        source[1:, :, :width].transpose(0, 1),
        source.transpose(1, 2)[:, :width],
        source[:1, :, :width].expand(4, -1, -1),
        source[:0, :, :width],
        torch._neg_view(source[:, :, :width].contiguous()),
    ]
    for x in cases:
        turned = _Regrouped.apply(x)
        assert turned.is_contiguous()
        assert torch.equal(turned, x.transpose(0, 1))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_ways_to_spread(dtype: torch.dtype) -> None:
    """A CPU takes the first, a GPU the second."""
    small, v = torch.randn(4, 7, 6, dtype=dtype), torch.randn(4, 4, dtype=dtype)
    wanted = torch.einsum("pb,pnk->nbk", v.double(), small.double())
    for spread in (_spread_by_token, _spread_at_once):
        assert_close(spread(small, v), wanted, TOLERANCE[dtype])


def test_gradients_of_regrouped_rows() -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_Regrouped.apply, (x,))
    assert torch.autograd.gradgradcheck(_Regrouped.apply, (x,))
    single = torch.randn(3, 2, 4, requires_grad=True)  # moved in words of eight bytes
    weight = torch.randn(2, 3, 4)
    (_Regrouped.apply(single) * weight).sum().backward()  # type: ignore[no-untyped-call]
    assert single.grad is not None
    assert torch.equal(single.grad, weight.transpose(0, 1))


@pytest.mark.parametrize(
    ("width", "dtype", "word"),
    [
        (8, torch.bfloat16, torch.int64),
        (6, torch.bfloat16, torch.int32),
        (3, torch.bfloat16, None),
        (8, torch.float32, torch.int64),
        (7, torch.float32, None),
        (8, torch.float64, None),
    ],
)
def test_rows_move_in_the_widest_words(
    width: int, dtype: torch.dtype, word: torch.dtype | None
) -> None:
    assert _word(torch.zeros(2, 3, width, dtype=dtype)) == word
