"""The `all_to_all` transport: tokens travel to all owners of experts, their updates back.

All sizes are known beforehand, so no process ever waits to read how many tokens chose an expert;
and a token's updates are added up in the owners' order, so two runs give the same bits.

Letters: N tokens of a process, D in, O out, E experts, G processes of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from moa.layers.experts import KroneckerRule, gate_columns, kronecker_delta, lora_delta, lora_down
from moa.layers.layer import MoALinear
from moa.layers.precision import full_precision, wide_product


@dataclass
class ExpertGroup:
    """The processes that share the experts, as this one sees them.

    Attributes:
        size: G.
        ep_rank: this process's place among them.
        group: torch's process group, once there is one.
        idle: the one number of a process that owns no expert; it takes part without doing anything.
        images: of this process's batch, and the most of any process's: those of an evaluation may
            differ.
    """

    size: int
    ep_rank: int
    group: Any = None
    idle: nn.Parameter | None = None
    images: tuple[int, int] = (1, 1)


class TokenExchange:
    """Evaluates the experts of one layer at their owners.

    Every process enters every collective, forward and backward, whether or not it has experts.
    """

    def __init__(self, members: ExpertGroup, layer: MoALinear, owners: Sequence[int]) -> None:
        self.members, self.layer = members, layer
        self.local = [e for e, owner in enumerate(owners) if owner == members.ep_rank]

    def __call__(self, tokens: Tensor, gates: Tensor, rule: Any) -> Tensor:
        """Sum over experts of gate_e * delta_e(x).

        Args:
            tokens: [N, D].
            gates: [N, E] or [1, E].
            rule: the slow weights of Kronecker experts, held (`hold_rule`); None with LoRA.

        Returns:
            [N, O].
        """
        number, (own, most) = len(tokens), self.members.images
        gates = gates.expand(number, -1)
        if own < most:
            padding = (0, 0, 0, number // own * most - number)
            tokens, gates = F.pad(tokens, padding), F.pad(gates, padding)
        anchor = torch.zeros((), device=tokens.device, requires_grad=torch.is_grad_enabled())
        everyone, weights = _ToAll.apply(tokens, gates, anchor, self.members)
        updates = self._evaluate(everyone, weights, rule)  # [G N, O]
        returned: Tensor = _Back.apply(updates, self.members)
        return returned.view(self.members.size, len(tokens), -1).sum(0)[:number]

    def _evaluate(self, tokens: Tensor, gates: Tensor, rule: Any) -> Tensor:
        """The local experts' sum for everyone's tokens, [G N, O]."""
        if not self.local:
            # A sum of nothing that ties input, rule and the idle number into the graph.
            tie = tokens[:0].sum() + gates[:0].sum().to(tokens.dtype)
            if rule is not None:
                tie = tie + rule.left[:0].sum() + rule.right[:0].sum()
            if self.members.idle is not None:
                tie = tie + self.members.idle[:0].sum()
            return tokens.new_zeros(len(tokens), self.layer.out_features) + tie
        experts: list[Any] = [self.layer.experts[e] for e in self.local]
        ranks = [self.layer.ranks[e] for e in self.local]
        columns = gate_columns(torch.cat([gates[:, e : e + 1] for e in self.local], dim=1), ranks)
        if self.layer.config.kronecker:
            return kronecker_delta(tokens, experts, columns, rule)
        with full_precision(tokens.device):
            h = wide_product(tokens, lora_down(experts))
        return lora_delta(h, experts, columns)


def hold_rule(rule: KroneckerRule) -> SimpleNamespace:
    """The rule's factors through a node of their own; call it first in a layer's forward.

    Autograd then hands a process its gradient of the rule in this layer after everything else of
    the layer, whether or not it has an expert there. DeepSpeed adds gradients up in the order in
    which they come, which must not differ from process to process.
    """
    left, right = _Held.apply(rule.left, rule.right)
    return SimpleNamespace(left=left, right=right)


class _Held(torch.autograd.Function):
    """The identity of two tensors."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return left.view_as(left), right.view_as(right)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class _ToAll(torch.autograd.Function):
    """Everyone's tokens [G N, D] and gates [G N, E]; backward sums the gradients at home.

    The anchor makes the result part of every process's graph, even where the rows are constants:
    otherwise that process would stay away from the others' backward.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, gates: Tensor, anchor: Tensor, members: ExpertGroup
    ) -> tuple[Tensor, Tensor]:
        ctx.members = members
        return _gathered(tokens, members), _gathered(gates, members)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        members: ExpertGroup = ctx.members
        tokens, gates = (
            _exchanged(g, members).view(members.size, -1, g.shape[1]).sum(0) for g in gradients
        )
        return tokens, gates, None, None


class _Back(torch.autograd.Function):
    """Each process's part of the rows [G N, W] to it; what comes is in the processes' order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, members: ExpertGroup) -> Tensor:
        ctx.members = members
        return _exchanged(rows, members)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchanged(gradient, ctx.members), None


def _gathered(rows: Tensor, members: ExpertGroup) -> Tensor:
    result = rows.new_empty(members.size * len(rows), rows.shape[1])
    dist.all_gather_into_tensor(result, rows.contiguous(), group=members.group)
    return result


def _exchanged(rows: Tensor, members: ExpertGroup) -> Tensor:
    result = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.all_to_all_single(result, rows.contiguous(), group=members.group)
    return result
