"""The `all_to_all` transport: tokens travel to the owners of their experts and back.

Letters: N tokens of a process, D in, O out, E experts, G processes of a group, K pairs of a token
and an expert that it chose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moa.layers.experts import KroneckerRule, kronecker_delta, lora_delta, lora_down
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
    """

    size: int
    ep_rank: int
    group: Any = None
    idle: nn.Parameter | None = None


class TokenExchange:
    """Evaluates the experts of one layer at their owners.

    Every process enters every collective, forward and backward, whether or not it has experts or
    tokens for them; experts that no token chose see none and get a gradient of zero.
    """

    def __init__(self, members: ExpertGroup, layer: MoALinear, owners: Sequence[int]) -> None:
        self.members, self.layer, self.owners = members, layer, list(owners)
        self.local = [e for e, owner in enumerate(owners) if owner == members.ep_rank]
        # By owner, then by number: the order in which tokens travel.
        self.place = torch.tensor([owner * len(owners) + e for e, owner in enumerate(owners)])

    def __call__(self, tokens: Tensor, gates: Tensor, rule: Any) -> Tensor:
        """Sum over experts of gate_e * delta_e(x).

        Args:
            tokens: [N, D].
            gates: [N, E] or [1, E].
            rule: the slow weights of Kronecker experts, held (`hold_rule`); None with LoRA.

        Returns:
            [N, O].
        """
        gates = gates.expand(len(tokens), -1)
        token, expert = gates.detach().nonzero(as_tuple=True)  # [K] each
        self.place = self.place.to(tokens.device)
        by_owner = self.place[expert].argsort(stable=True)
        token, expert = token[by_owner], expert[by_owner]
        to_send, to_receive, blocks = self._sizes(expert)
        received = all_to_all(tokens[token], to_send, to_receive, self.members)
        done = self._evaluate(received, blocks, rule)
        returned = all_to_all(done, to_receive, to_send, self.members)  # [K, O]
        weighted = returned * gates[token, expert].unsqueeze(1).to(returned.dtype)
        result = weighted.new_zeros(len(tokens), returned.shape[1])
        return result.index_add(0, token, weighted)

    def _sizes(self, expert: Tensor) -> tuple[list[int], list[int], list[int]]:
        """Rows to send to each process, to receive from each, and per (process, local expert)."""
        number, processes = len(self.owners), self.members.size
        mine = expert.bincount(minlength=number)
        gathered = mine.new_empty(processes * number)
        dist.all_gather_into_tensor(gathered, mine, group=self.members.group)
        counts = gathered.view(processes, number).tolist()
        to_send = [0] * processes
        for owner, count in zip(self.owners, counts[self.members.ep_rank], strict=True):
            to_send[owner] += count
        blocks = [[theirs[e] for e in self.local] for theirs in counts]
        return to_send, [sum(block) for block in blocks], list(chain.from_iterable(blocks))

    def _evaluate(self, received: Tensor, blocks: list[int], rule: Any) -> Tensor:
        """The local experts' updates [rows, O] of received tokens, in the order of arrival."""
        width = len(self.local)
        pieces = torch.split(received, blocks) if width else ()
        done: list[Tensor] = [received.new_zeros(0)] * len(blocks)
        for j, e in enumerate(self.local):
            update = self._update(e, torch.cat(pieces[j::width]), rule)  # from every process
            done[j::width] = torch.split(update, blocks[j::width])
        # A sum of nothing that ties input, rule and idle processes into the graph of each.
        tie = received[:0].sum()
        if rule is not None:
            tie = tie + rule.left[:0].sum() + rule.right[:0].sum()
        if self.members.idle is not None:
            tie = tie + self.members.idle[:0].sum()
        result = torch.cat(done) if width else received.new_zeros(0, self.layer.out_features)
        return result + tie

    def _update(self, number: int, tokens: Tensor, rule: Any) -> Tensor:
        experts: list[Any] = [self.layer.experts[number]]
        if self.layer.config.kronecker:
            return kronecker_delta(tokens, experts, None, rule)
        with full_precision(tokens.device):
            h = wide_product(tokens, lora_down(experts))
        return lora_delta(h, experts, None)


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


def all_to_all(
    rows: Tensor, to_send: list[int], to_receive: list[int], members: ExpertGroup
) -> Tensor:
    """Sends rows [sum(to_send), W] in pieces to the processes; returns [sum(to_receive), W]."""
    anchor = torch.zeros((), device=rows.device, requires_grad=torch.is_grad_enabled())
    result: Tensor = _AllToAll.apply(rows, anchor, to_send, to_receive, members)
    return result


class _AllToAll(torch.autograd.Function):
    """all_to_all with uneven pieces; backward sends the gradients back.

    The anchor makes the result part of every process's graph, even where the rows are constants:
    otherwise that process would stay away from the others' backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        anchor: Tensor,
        to_send: list[int],
        to_receive: list[int],
        members: ExpertGroup,
    ) -> Tensor:
        ctx.to_send, ctx.to_receive, ctx.members = to_send, to_receive, members
        return _exchange(rows, to_send, to_receive, members)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        back = _exchange(gradient, ctx.to_receive, ctx.to_send, ctx.members)
        return back, None, None, None, None


def _exchange(
    rows: Tensor, to_send: list[int], to_receive: list[int], members: ExpertGroup
) -> Tensor:
    received = rows.new_empty(sum(to_receive), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), to_receive, to_send, group=members.group)
    return received
