"""LoRA and Kronecker (KAdaptation) experts, all evaluated together in factored form.

Letters: N tokens, D in, O out, E experts, r_e rank of expert e, R sum of the ranks, which several
experts fill up to a multiple of `ALIGNMENT`, P = kron_dim.
All experts of a layer share two skinny products: the ranks are concatenated, the R intermediate
columns are multiplied by each token's gate, and nothing of size D x O is ever formed.

Sources: LoRA, arXiv 2106.09685; KAdaptation, arXiv 2203.16329; the mixture, arXiv 2310.11031.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moa.layers.own_backward import OwnBackward

ALIGNMENT = 8
"""Several experts fill their ranks up to a multiple of this by zeros: a skinny product of 15
columns takes a CPU up to 2.7 times as long as one of 16, and a GPU's matrix units want rows of
whole 16 bytes."""


class LoRAExpert(nn.Module):
    """Low-rank update `delta(x) = up down x`, zero at the start; in dtype and device of `like`."""

    def __init__(self, dim_in: int, dim_out: int, rank: int, like: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(like.new_empty(rank, dim_in).normal_(0.0, 1.0 / rank))
        self.up = nn.Parameter(like.new_zeros(dim_out, rank))


class KroneckerRule(nn.Module):
    """The slow weights A_p = u_p v_p^T, p < P, shared by all layers and experts.

    `left` [P, P] holds u_p in row p, `right` [P, P] holds v_p in row p, both from U(-0.01, 0.01).
    """

    def __init__(self, kron_dim: int, like: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(like.new_empty(kron_dim, kron_dim).uniform_(-0.01, 0.01))
        self.right = nn.Parameter(like.new_empty(kron_dim, kron_dim).uniform_(-0.01, 0.01))


class KroneckerExpert(nn.Module):
    """Fast weights of one KAdaptation expert: H = sum_p A_p kron (left[p] right[p]).

    `left` [P, D/P, r] and `right` [P, r, O/P] start from Xavier uniform with gain sqrt 2, with the
    fan of the P small matrices. The update is tiny but not zero at the start, since A_p is. P must
    divide D and O; dtype and device are those of `like`.
    """

    def __init__(self, dim_in: int, dim_out: int, rank: int, kron_dim: int, like: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(like.new_empty(kron_dim, dim_in // kron_dim, rank))
        self.right = nn.Parameter(like.new_empty(kron_dim, rank, dim_out // kron_dim))
        for factor in (self.left, self.right):
            bound = math.sqrt(2.0) * math.sqrt(6.0 / (factor.shape[1] + factor.shape[2]))
            nn.init.uniform_(factor, -bound, bound)


def gate_columns(gates: Tensor | None, ranks: Sequence[int]) -> Tensor | None:
    """Each expert's gate, repeated for each of its ranks: [N, E] to [N, R]; None stays None."""
    if gates is None:
        return None
    pieces = [g.expand(-1, r) for g, r in zip(torch.split(gates, 1, dim=1), ranks, strict=True)]
    return _filled(pieces, dim=1)


def fill(columns: Tensor, ranks: Sequence[int]) -> Tensor:
    """Columns [N, sum of the ranks] with zeros appended, [N, R]."""
    return _filled(torch.split(columns, list(ranks), dim=1), dim=1)


def _weighted(h: Tensor, columns: Tensor | None) -> Tensor:
    return h if columns is None else h * columns.to(h.dtype)


def lora_down(experts: Sequence[LoRAExpert]) -> Tensor:
    """The first factors of all experts, filled up: [R, D]."""
    return _filled([e.down for e in experts], dim=0)


def lora_delta(h: Tensor, experts: Sequence[LoRAExpert], columns: Tensor | None) -> Tensor:
    """Sum over experts of `gate_e * up_e down_e x`, [N, O] in the experts' dtype.

    `h` [N, R] is the first product, x lora_down^T. `columns` [N, R] or [1, R] weighs each token's
    rank columns; None is a weight of one.
    """
    up = _filled([e.up for e in experts], dim=1)  # [O, R]
    return _weighted(h, columns).to(up.dtype) @ up.T


def kronecker_delta(
    x: Tensor, experts: Sequence[KroneckerExpert], columns: Tensor | None, rule: KroneckerRule
) -> Tensor:
    """Sum over experts of `gate_e * x H_e` without forming any H_e.

    With X = x viewed as [N, P, D/P]: Z[p] = (sum_a u_p[a] X[:, a, :]) left[p] over all ranks at
    once, gated, then Y[p] = Z[p] right[p] and y[:, b, :] = sum_p v_p[b] Y[p]. `columns` are as in
    `lora_delta`. From tokens [N, D] to [N, O], in the dtype of `x`.
    """
    left = _filled([e.left for e in experts], dim=2)  # [P, D/P, R]
    right = _filled([e.right for e in experts], dim=1)  # [P, R, O/P]
    dim, width, _ = left.shape
    rows = _regrouped(x.view(len(x), dim, width)).flatten(1)
    mixed = (rule.left @ rows).view(dim, len(x), width)
    z = _weighted(mixed @ left, columns)  # [P, N, R]
    y: Tensor = _Spread.apply(z @ right, rule.right.to(z.dtype))  # [N, P, O/P]
    return _regrouped(y.transpose(0, 1)).flatten(1)


def overlap(layers: Sequence[Sequence[Any]]) -> Tensor:
    """How much of the input the experts of a layer share, summed over its pairs and over layers.

    Of a pair |A_i A_j^T|^2 / (|A_i|^2 |A_j|^2) in Frobenius norms, from 0 (orthogonal) to 1, A the
    down factor; of Kronecker experts the mean over p of that of their left[p]^T. All layers have
    experts of the same kind and ranks. At least fp32.
    """
    ranks, grams = [_first_factor(e).shape[1] for e in layers[0]], []
    for experts in layers:
        rows = torch.cat([_first_factor(e) for e in experts], dim=1)  # [P, R, D/P]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        grams.append(rows @ rows.mT)
    gram = torch.stack(grams)  # [L, P, R, R]
    members = torch.block_diag(*(gram.new_ones(1, rank) for rank in ranks))  # type: ignore[no-untyped-call]
    sizes = gram.diagonal(dim1=-2, dim2=-1) @ members.T  # [L, P, E]
    shared = members @ gram.square() @ members.T
    shares: Tensor = shared / (sizes[..., :, None] * sizes[..., None, :])
    return shares.triu(1).mean(1).sum()


def _first_factor(expert: LoRAExpert | KroneckerExpert) -> Tensor:
    """[P, r, D/P]; P is 1 for LoRA."""
    return expert.down[None] if isinstance(expert, LoRAExpert) else expert.left.mT


def _filled(factors: Sequence[Tensor], dim: int) -> Tensor:
    """All experts' factors side by side, with zeros up to a multiple of `ALIGNMENT` ranks.

    A lone expert's are given back as they are: its rank is what was asked for.
    """
    if len(factors) == 1:
        return factors[0]
    missing = -sum(f.shape[dim] for f in factors) % ALIGNMENT
    if not missing:
        return torch.cat(list(factors), dim=dim)
    shape = list(factors[0].shape)
    shape[dim] = missing
    zeros = factors[0].new_zeros([1] * len(shape)).expand(shape)  # one number: quickly filled
    return torch.cat([*factors, zeros], dim=dim)


class _Spread(OwnBackward):
    """y[:, b, :] = sum_p v_p[b] Y[p]: from Y [P, N, K] and v [P, P] to [N, P, K].

    Autograd's own backward of the product per token would keep a [P, P] for each of them.
    """

    @staticmethod
    def forward(small: Tensor, v: Tensor) -> Tensor:
        return _spread_by_token(small, v) if small.is_cpu else _spread_at_once(small, v)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        small, v = ctx.saved_tensors
        rows = _regrouped(gradient).flatten(1)
        return (v @ rows).view_as(small), small.flatten(1) @ rows.T


def _spread_by_token(small: Tensor, v: Tensor) -> Tensor:
    """A product per token, which needs no reordering afterwards."""
    return torch.bmm(v.T.expand(small.shape[1], -1, -1), small.transpose(0, 1))


def _spread_at_once(small: Tensor, v: Tensor) -> Tensor:
    """One large product: CUDA's batched ones are not to be trusted beyond 65,535 tokens."""
    return (v.T @ small.flatten(1)).view_as(small).transpose(0, 1)


def _regrouped(x: Tensor) -> Tensor:
    """[A, B, K] to a contiguous [B, A, K], which is a copy only if it must be."""
    turned = x.transpose(0, 1)
    return turned if turned.is_contiguous() else _Regrouped.apply(x)


class _Regrouped(OwnBackward):
    """The copy. Rows of K numbers move in words as wide as fit them: a GPU moves word by word."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        word = _word(x)
        rows = x if word is None else x.view(word)
        turned = rows.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        return turned if word is None else turned.view(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Backward needs nothing."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        result: Tensor = _Regrouped.apply(gradient)
        return result


def _word(x: Tensor) -> torch.dtype | None:
    """The widest type as which the rows of `x` can be read; None if that is its own."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or x.stride(-1) != 1 or x.is_neg():
        return None
    for word in (torch.int64, torch.int32):
        whole = word.itemsize // x.element_size()
        places = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
        if whole > 1 and all(place % whole == 0 for place in places):
            return word
    return None


def kronecker_matrix(expert: KroneckerExpert, rule: KroneckerRule) -> Tensor:
    """H [D, O] of one expert, formed."""
    small = expert.left @ expert.right  # [P, D/P, O/P]
    full = torch.einsum("pa,pb,pio->aibo", rule.left, rule.right, small)
    return full.flatten(2).flatten(0, 1)


def dense_delta(x: Tensor, matrices: Sequence[Tensor], gates: Tensor | None) -> Tensor:
    """Sum over experts of `gate_e * x H_e`, [N, O], slow and obvious.

    From tokens [N, D], the H_e [D, O], and gates [N, E] or None for a weight of one.
    """
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for e, matrix in enumerate(matrices):
        total = total + _weighted(x @ matrix, None if gates is None else gates[:, e : e + 1])
    return total
