"""`MoALinear`: a frozen linear layer with adapters beside it.

Letters: B images, T tokens per image, N = B T tokens, D in, O out, E experts, R sum of their ranks,
M width of the router's projection.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa.config import MoAConfig
from moa.errors import MoAConfigError
from moa.layers.experts import (
    KroneckerExpert,
    KroneckerRule,
    LoRAExpert,
    dense_delta,
    fill,
    gate_columns,
    kronecker_delta,
    kronecker_matrix,
    lora_delta,
    lora_down,
)
from moa.layers.noise import fresh_key, images_and_tokens, normal, uniform
from moa.layers.precision import full_precision, wide_product
from moa.layers.router import Routing, UniformRouter, choose, make_router


class AbsentExpert(nn.Module):
    """The place of an expert that another process owns (`moa.parallel.expert_parallel`)."""


class MoALinear(nn.Module):
    """y = base(x) + sum_e gate_e(x) delta_e(x) + bias, with `base` frozen.

    `bias` exists only with Kronecker experts. A config without a router (`lora`, `kadaptation`) has
    one expert with a gate of one. A LoRA layer starts exactly equal to its base, a Kronecker layer
    within the tiny update that its initial factors give.

    Args:
        base: the linear layer to wrap; its parameters are frozen here.
        config: a method with adapters.
        kron_rule: the model's shared rule; a lone Kronecker layer makes its own.

    Raises:
        MoAConfigError: the config is illegal, or `kron_dim` does not divide the layer's widths.
    """

    noise_key: Tensor | None
    """[KEY_WORDS] of the running micro-batch; None draws from torch's own generator"""
    shared_noise: Callable[[int, int, int], Tensor] | None
    """draws this layer's gate noise together with all others'; None draws from the key"""
    num_images: int | None
    """of the running micro-batch; None takes the first axis of the input"""
    remote_experts: Callable[[], list[Any]] | None
    """under expert parallelism by `gather`: the factors of all experts, whoever owns them"""
    exchange: Callable[[Tensor, Tensor, Any], Tensor] | None
    """under expert parallelism by `all_to_all`: the experts' sum from tokens, gates and rule"""
    hold_rule: Callable[[KroneckerRule], Any] | None
    """what that transport does with the rule before anything else"""
    record_gates: Callable[[Tensor], object] | None
    """receives every forward's gates [B, ..., E] of a router that decides per token"""

    def __init__(
        self, base: nn.Linear, config: MoAConfig, kron_rule: KroneckerRule | None = None
    ) -> None:
        super().__init__()
        config.check()
        if not isinstance(base, nn.Linear):
            raise MoAConfigError(f"base: {type(base).__name__}; must be a torch.nn.Linear")
        config = config.resolved()
        if not config.adapts:
            raise MoAConfigError(f"moa.method: {config.method!r} does not wrap layers")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.config, self.ranks = config, list(config.ranks or ())
        self._routing: Routing | None = None  # with graph, until the auxiliary loss takes it
        self._routed: Routing | None = None  # the same without
        self._chosen: Tensor | None = None  # [E] tokens, summed until the balance takes it
        self._shared_rule: tuple[KroneckerRule, ...] = ()  # a tuple hides it from the module tree
        self.register_buffer("noise_key", None, persistent=False)
        # Here, not in the class: a compiler takes the first assignment later on for a change.
        self.shared_noise = self.num_images = self.record_gates = None
        self.remote_experts = self.exchange = self.hold_rule = None
        self._kept = config.experts_kept
        self._random = config.expert_dropout > 0 or (config.routed and config.gate_noise > 0)
        self.bias: nn.Parameter | None = None
        if config.kronecker:
            check_kron_dim(base, config.kron_dim, "the layer")
            self.bias = nn.Parameter(base.weight.new_zeros(self.out_features))
            if kron_rule is None:
                self.kron_rule = kron_rule = KroneckerRule(config.kron_dim, base.weight)
            self._shared_rule = (kron_rule,)
        self.experts = nn.ModuleList(self._expert(rank) for rank in self.ranks)
        self.shared_expert = self._expert(config.shared_rank) if config.shared_rank else None
        self.router = make_router(config, self.in_features, base.weight)

    def _expert(self, rank: int) -> LoRAExpert | KroneckerExpert:
        sizes, weight = (self.in_features, self.out_features, rank), self.base.weight
        if self.config.kronecker:
            return KroneckerExpert(*sizes, self.config.kron_dim, weight)
        return LoRAExpert(*sizes, weight)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which cannot take what hangs in a graph."""
        return {**self.__dict__, "_routing": None}

    def extra_repr(self) -> str:
        """The settings that tell two layers apart."""
        return f"method={self.config.method}, ranks={self.ranks}"

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, ..., D] to [B, ..., O]; the first axis counts images (for the gate noise)."""
        if x.dim() == 1:  # a lone token, which a linear layer takes too
            return self.forward(x.unsqueeze(0)).squeeze(0)
        rule: Any = self.rule if self._shared_rule else None
        if rule is not None and self.hold_rule is not None:
            rule = self.hold_rule(rule)
        tokens = x.reshape(-1, self.in_features)
        key = None
        if self.training and self._random:
            key = fresh_key(x.device) if self.noise_key is None else self.noise_key
        gates, h = self._route(x, tokens, key)
        delta = self._delta(x, tokens, gates, h, key, rule).view(*x.shape[:-1], self.out_features)
        y: Tensor = self.base(x) + delta
        return y if self.bias is None else y + self.bias

    @property
    def rule(self) -> KroneckerRule:
        """The slow weights of Kronecker experts."""
        return self._shared_rule[0]

    def all_experts(self) -> list[Any]:
        """The experts that this process evaluates, after them the shared one if there is one."""
        shared = [] if self.shared_expert is None else [self.shared_expert]
        if self.exchange is not None:
            return shared
        routed = self.experts if self.remote_experts is None else self.remote_experts()
        return [*routed, *shared]

    def _route(
        self, x: Tensor, tokens: Tensor, key: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gates [N, E] or [1, E], None without a router; and the LoRA experts' first product."""
        experts = [] if self.config.kronecker else self.all_experts()
        down = lora_down(experts) if experts else None
        router = self.router
        with full_precision(x.device):
            if router is None or isinstance(router, UniformRouter):
                gates = None if router is None else router()
                return gates, None if down is None else F.linear(tokens, down.to(tokens.dtype))
            if down is None:
                projected, h = wide_product(tokens, router.weight), None
            else:  # one product for the router and all experts
                both = wide_product(tokens, torch.cat([router.weight, down]))
                width = router.weight.shape[0]
                projected, h = both[:, :width], both[:, width:]
            routing = self._choose(x, router(projected), router.balance_steps, key)
        if self.record_gates is not None:
            self.record_gates(routing.gates.detach().view(*x.shape[:-1], -1))
        self._record(routing)
        return routing.gates, h

    def _choose(
        self, x: Tensor, logits: Tensor, steps: Tensor | None, key: Tensor | None
    ) -> Routing:
        noise, scale = None, self.config.gate_noise / len(self.ranks)
        if key is not None and scale > 0:
            # A compiler makes one operation of the layer's own draw.
            draw = None if torch.compiler.is_compiling() else self.shared_noise
            draw = draw or partial(normal, key)
            noise = scale * draw(*images_and_tokens(x, self.num_images), len(self.ranks))
        bias = None if steps is None else self.config.balance_rate * steps
        return choose(logits, noise, self._kept, bias)

    def _delta(
        self,
        x: Tensor,
        tokens: Tensor,
        gates: Tensor | None,
        h: Tensor | None,
        key: Tensor | None,
        rule: Any,
    ) -> Tensor:
        """The experts' sum [N, O]."""
        experts, routed, columns = self.all_experts(), None, None
        if self.exchange is not None:
            assert gates is not None
            routed = self.exchange(tokens, gates, rule)
            if not experts:
                return routed
        else:
            if gates is not None and self.shared_expert is not None:
                gates = torch.cat([gates, torch.ones_like(gates[:, :1])], dim=1)
            if self.config.kron_impl == "dense":
                return self._dense_delta(tokens, experts, gates, key)
            ranks = [*self.ranks, *([self.config.shared_rank] if self.config.shared_rank else [])]
            columns, rate = gate_columns(gates, ranks), self.config.expert_dropout
            if key is not None and rate > 0:
                kept = uniform(key, *images_and_tokens(x, self.num_images), sum(ranks)) > rate
                mask = fill(kept / (1 - rate), ranks)
                columns = mask if columns is None else columns * mask
        if self.config.kronecker:
            delta = kronecker_delta(tokens, experts, columns, rule)
        else:
            assert h is not None
            delta = lora_delta(h, experts, columns)
        return delta if routed is None else routed + delta

    def _dense_delta(
        self, tokens: Tensor, experts: list[Any], gates: Tensor | None, key: Tensor | None
    ) -> Tensor:
        """With every H_e formed; dropout strikes its elements, alike for the whole batch."""
        matrices = [kronecker_matrix(e, self.rule) for e in experts]
        rate = self.config.expert_dropout
        if key is not None and rate > 0:
            start = torch.cat([key[:-1], torch.zeros_like(key[-1:])])  # whatever part this is
            width = len(experts) * self.out_features
            kept = (uniform(start, self.in_features, 1, width) > rate).chunk(len(experts), dim=1)
            matrices = [
                m * (k / (1 - rate)).to(m.dtype) for m, k in zip(matrices, kept, strict=True)
            ]
        return dense_delta(tokens, matrices, gates)

    def _record(self, routing: Routing) -> None:
        """Keeps the routing of a training forward, for the auxiliary loss and the statistics."""
        if not self.training:
            return
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing recomputes in backward: the routing was taken
        self._routing, self._routed = routing, routing.detach()
        if self.config.balance == "bias":
            total = (routing.gates.detach() > 0).float().sum(0)
            self._chosen = total if self._chosen is None else self._chosen + total

    def take_routing(self) -> Routing | None:
        """The routing of the last training forward, with graph, once; None if there is none."""
        routing, self._routing = self._routing, None
        return routing

    def take_chosen(self) -> Tensor | None:
        """Tokens [E] that chose each expert since the last call, in training forwards."""
        chosen, self._chosen = self._chosen, None
        return chosen

    @contextmanager
    def compiled_forward(self) -> Iterator[None]:
        """Around a compiled forward, which always records, and must meet the same state each time.

        What it counts is added to what was counted, and a recomputation leaves nothing.
        """
        before = self._routing, self._routed, self._chosen
        self._chosen = None
        try:
            yield
        finally:
            if torch._C._current_graph_task_id() != -1:
                self._routing, self._routed, self._chosen = before
            elif before[2] is not None:
                self._chosen = before[2] if self._chosen is None else before[2] + self._chosen

    def stats(self) -> dict[str, Tensor]:
        """`load` [E], `entropy`, `max_prob`, `temperature` of the last training forward.

        A uniform mixture has its weights as `load`, and their entropy and maximum.
        """
        if isinstance(self.router, UniformRouter):
            with torch.no_grad():
                weights = self.router()[0]
            entropy = torch.special.entr(weights).sum()
            return {"load": weights, "entropy": entropy, "max_prob": weights.amax()}
        if self.router is None or self._routed is None:
            return {}
        temperature = getattr(self.router, "temperature", None)
        known = {} if temperature is None else {"temperature": temperature.detach()[0]}
        return {**self._routed.stats(), **known}


def check_kron_dim(base: nn.Linear, kron_dim: int, name: str) -> None:
    """Raises `MoAConfigError` unless `kron_dim` divides both widths of `base`."""
    for width in (base.in_features, base.out_features):
        if width % kron_dim:
            legal = [d for d in range(1, 257) if base.in_features % d == base.out_features % d == 0]
            raise MoAConfigError(
                f"moa.kron_dim: {kron_dim} does not divide the width {width} of {name}; legal up "
                f"to 256: {', '.join(map(str, legal))}"
            )


def moa_layers(model: nn.Module) -> Iterator[tuple[str, MoALinear]]:
    """Every `MoALinear` of a model with its module path, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, MoALinear):
            yield name, module
