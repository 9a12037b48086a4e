"""LoRA and Kronecker (KAdaptation) experts, all evaluated together in factored form.

Letters: N tokens, D in, O out, E experts, r_e rank of expert e, R = sum of ranks, P = kron_dim.
All experts of a layer share two skinny products: the ranks are concatenated, the R intermediate
columns are multiplied by each token's gate, and nothing of size D x O is ever formed.

Sources: LoRA, arXiv 2106.09685; KAdaptation, arXiv 2203.16329; the mixture, arXiv 2310.11031.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LoRAExpert(nn.Module):
    """Low-rank update `delta(x) = up down x`, zero at the start.

    Args:
        dim_in: D.
        dim_out: O.
        rank: r, at least 1.
        like: tensor whose dtype and device the parameters take.
    """

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
    fan of the P small matrices. The update is tiny but not zero at the start, since A_p is.

    Args:
        dim_in: D, a multiple of `kron_dim`.
        dim_out: O, a multiple of `kron_dim`.
        rank: r, at least 1.
        kron_dim: P.
        like: tensor whose dtype and device the parameters take.
    """

    def __init__(self, dim_in: int, dim_out: int, rank: int, kron_dim: int, like: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(like.new_empty(kron_dim, dim_in // kron_dim, rank))
        self.right = nn.Parameter(like.new_empty(kron_dim, rank, dim_out // kron_dim))
        for factor in (self.left, self.right):
            bound = math.sqrt(2.0) * math.sqrt(6.0 / (factor.shape[1] + factor.shape[2]))
            nn.init.uniform_(factor, -bound, bound)


def _gate_columns(h: Tensor, gates: Tensor | None, ranks: Sequence[int]) -> Tensor:
    """Multiplies the R last columns of `h` [..., N, R] by each token's gate [N, E]."""
    if gates is None:
        return h
    repeats = torch.tensor(list(ranks), device=gates.device)
    columns = gates.repeat_interleave(repeats, dim=-1, output_size=sum(ranks))  # [N, R]
    return h * columns.to(h.dtype)


def lora_delta(x: Tensor, experts: Sequence[LoRAExpert], gates: Tensor | None) -> Tensor:
    """Sum over experts of `gate_e * up_e down_e x`.

    Args:
        x: tokens [N, D].
        experts: E experts of any ranks.
        gates: [N, E], or None for a gate of one.

    Returns:
        [N, O], dtype of `x`.
    """
    down = torch.cat([e.down for e in experts])  # [R, D]
    up = torch.cat([e.up for e in experts], dim=1)  # [O, R]
    h = _gate_columns(x @ down.T, gates, [e.down.shape[0] for e in experts])  # [N, R]
    return h @ up.T


def kronecker_delta(
    x: Tensor, experts: Sequence[KroneckerExpert], gates: Tensor | None, rule: KroneckerRule
) -> Tensor:
    """Sum over experts of `gate_e * x H_e` without forming any H_e.

    With X = x viewed as [N, P, D/P]: Z[p] = (sum_a u_p[a] X[:, a, :]) left[p] over all ranks at
    once, gated, then Y[p] = Z[p] right[p] and y[:, b, :] = sum_p v_p[b] Y[p].

    Args:
        x: tokens [N, D].
        experts: E experts of any ranks.
        gates: [N, E], or None for a gate of one.
        rule: the shared slow weights.

    Returns:
        [N, O], dtype of `x`.
    """
    left = torch.cat([e.left for e in experts], dim=2)  # [P, D/P, R]
    right = torch.cat([e.right for e in experts], dim=1)  # [P, R, O/P]
    dim = left.shape[0]
    mixed = torch.einsum("pa,nad->pnd", rule.left, x.view(x.shape[0], dim, left.shape[1]))
    z = _gate_columns(mixed @ left, gates, [e.left.shape[2] for e in experts])  # [P, N, R]
    y = torch.einsum("pb,pno->nbo", rule.right, z @ right)  # [N, P, O/P]
    return y.flatten(1)
