"""Routers of Mixture-of-Adapters and the load balancing loss (arXiv 2310.11031).

Letters: L layers, N tokens, D in, K width of a router's projection, M router dimension, E experts.

A router's first product with the tokens is left to the layer, which shares it with that of the LoRA
experts: a router has a `weight` [K, D] and turns `x weight^T` into logits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moa.config import MoAConfig
from moa.layers.own_backward import OwnBackward
from moa.layers.precision import wide_dtype

MAX_LOG_SCALE = math.log(100.0)
"""The logits' scale exp(temperature) is capped at 100."""


@dataclass(frozen=True)
class Routing:
    """What a router decided for N tokens.

    Attributes:
        gates: [N, E] weight of each expert, zero where it was not chosen.
        logits: [N, E] without noise.
        top_prob: [N] largest probability of the softmax that chose (noisy in training).
    """

    gates: Tensor
    logits: Tensor
    top_prob: Tensor

    @property
    def probs(self) -> Tensor:
        """Noise-free softmax [N, E]."""
        return self.logits.softmax(-1)

    def detach(self) -> "Routing":
        """Without graph."""
        return Routing(self.gates.detach(), self.logits.detach(), self.top_prob.detach())

    def stats(self) -> dict[str, Tensor]:
        """`load` [E], the share of tokens that chose each expert, `entropy` and `max_prob`."""
        probs = self.probs
        return {
            "load": (self.gates > 0).float().mean(0),
            "entropy": torch.special.entr(probs).sum(-1).mean(),
            "max_prob": probs.amax(-1).mean(),
        }


class TokenRouter(nn.Module):
    """A router that decides for every token.

    Attributes:
        balance_steps: [E] int64, the choice's bias in steps of `balance_rate`; None without. Whole
            steps, so that a change of precision or of world size leaves them exact.
    """

    balance_steps: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("balance_steps", None)

    @property
    def weight(self) -> Tensor:
        """[K, D], which the layer multiplies with the tokens."""
        raise NotImplementedError


class CosineRouter(TokenRouter):
    """Routes by the cosine between a projected token and one embedding per expert.

    logits = exp(min(temperature, ln 100)) * cos(proj(x), embed_e). The scale starts at 2. The
    parameters take dtype and device of `like`.
    """

    def __init__(self, dim: int, num_experts: int, router_dim: int, like: Tensor) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, router_dim, device=like.device, dtype=like.dtype)
        self.embed = nn.Parameter(like.new_empty(router_dim, num_experts).normal_(0.0, 0.01))
        self.temperature = nn.Parameter(like.new_full((1,), math.log(1 / 0.5)))

    @property
    def weight(self) -> Tensor:
        """[M, D]."""
        return self.proj.weight

    def forward(self, projected: Tensor) -> Tensor:
        """Scaled cosines [N, E] from `x weight^T` [N, M], in its dtype."""
        z = projected + self.proj.bias  # in the wider dtype of the two, as all that follows
        logits: Tensor = _ScaledCosine.apply(z, self.embed, self.temperature)
        return logits


class _ScaledCosine(OwnBackward):
    """Cosines of z [N, M] and embed [M, E], times exp(min(temperature, ln 100)): [N, E].

    One node instead of a dozen, since a GPU waits for the launches of small operations. Backward
    starts from inputs and output alone, so that it can itself be differentiated.
    """

    @staticmethod
    def forward(z: Tensor, embed: Tensor, temperature: Tensor) -> Tensor:
        scaled = embed * (_scale(temperature, z.dtype) / _length(embed, 0, z.dtype))
        # Dividing the product by the length of z, not z itself, needs no further [N, M].
        return (z @ scaled) / _length(z, -1, z.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, embed, temperature, logits = ctx.saved_tensors
        length, size = _length(z, -1, z.dtype), _length(embed, 0, z.dtype)  # [N, 1], [1, E]
        factor = _scale(temperature, z.dtype) / size
        scaled, of_product = embed * factor, gradient / length
        along = (gradient * logits).sum(-1, keepdim=True)
        of_z = torch.addcmul(of_product @ scaled.T, z, along / length.square(), value=-1)
        of_scaled = z.T @ of_product
        by_expert = (of_scaled * scaled).sum(0)
        of_embed = of_scaled * factor - embed * (by_expert / size.square())
        of_temperature = along.sum() * (temperature <= MAX_LOG_SCALE)
        return of_z, of_embed.to(embed.dtype), of_temperature.to(temperature.dtype)


def _length(vectors: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True, dtype=dtype)
    return length.clamp(min=1e-12)


def _scale(temperature: Tensor, dtype: torch.dtype) -> Tensor:
    return temperature.to(dtype).clamp(max=MAX_LOG_SCALE).exp()


class LinearRouter(TokenRouter):
    """Routes by a linear map of the token: logits = x embed, with `embed` [D, E]."""

    def __init__(self, dim: int, num_experts: int, like: Tensor) -> None:
        super().__init__()
        self.embed = nn.Parameter(like.new_empty(dim, num_experts).normal_(0.0, 0.01))

    @property
    def weight(self) -> Tensor:
        """[E, D]."""
        return self.embed.T

    def forward(self, projected: Tensor) -> Tensor:
        """Logits [N, E], which are `x weight^T` itself."""
        return projected


class UniformRouter(nn.Module):
    """One learned softmax vector per layer, alike for all tokens; starts as the plain mean."""

    def __init__(self, num_experts: int, like: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(like.new_zeros(num_experts))

    def forward(self) -> Tensor:
        """Weights [1, E], at least fp32."""
        return self.logits.to(wide_dtype(self.logits.dtype)).softmax(0).unsqueeze(0)


def make_router(config: MoAConfig, dim: int, like: Tensor) -> TokenRouter | UniformRouter | None:
    """The router that a resolved configuration asks for; None if there is one expert."""
    if not config.mixes:
        return None
    number = len(config.ranks or ())
    if config.router == "uniform":
        return UniformRouter(number, like)
    router: TokenRouter
    if config.router == "linear":
        router = LinearRouter(dim, number, like)
    else:
        router = CosineRouter(dim, number, config.router_dim, like)
    if config.balance == "bias":
        router.balance_steps = torch.zeros(number, dtype=torch.int64, device=like.device)
    return router


def choose(logits: Tensor, noise: Tensor | None, kept: int, bias: Tensor | None = None) -> Routing:
    """Keeps `kept` experts for every token; their softmax weights are not renormalised.

    Args:
        logits: [N, E].
        noise: [N, E] to add to the logits before choosing, or None.
        kept: 1 to E.
        bias: [E] added to the probabilities when comparing them, not to the weights.
    """
    chosen = (logits if noise is None else logits + noise.to(logits)).softmax(-1)
    if kept == logits.shape[-1]:
        return Routing(chosen, logits, chosen.amax(-1))
    score = chosen.detach() if bias is None else chosen.detach() + bias.to(chosen.dtype)
    ids = score.argmax(-1, keepdim=True) if kept == 1 else score.topk(kept, dim=-1).indices
    gates = chosen * torch.zeros_like(score).scatter_(-1, ids, 1)
    return Routing(gates, logits, gates.sum(-1) if kept == 1 else gates.amax(-1))


def balance_counts(routings: Sequence[Routing]) -> Tensor:
    """Importance and smooth load of each expert of L layers, summed over tokens, as [L, 2, E].

    importance_e = sum of the noise-free softmax; load_e = sum of Phi((p_e - p_max) * E), with p
    noise-free and p_max the chosen maximum. Sums add up over processes: the loss can be global.
    """
    if len({routing.logits.shape for routing in routings}) > 1:
        return torch.cat([balance_counts([routing]) for routing in routings])
    probs = torch.stack([routing.logits for routing in routings]).softmax(-1)  # [L, N, E]
    top = torch.stack([routing.top_prob for routing in routings])
    load = torch.special.ndtr((probs - top.unsqueeze(-1)) * probs.shape[-1])
    return torch.stack([probs, load]).sum(2).transpose(0, 1)


def balance_loss(counts: Tensor) -> Tensor:
    """1/2 [CV^2(importance) + CV^2(load)] from counts [..., 2, E], summed over leading axes.

    CV^2 is the unbiased variance over experts divided by (mean^2 + 1e-10).
    """
    cv2 = counts.var(-1, unbiased=True) / (counts.mean(-1).square() + 1e-10)
    return 0.5 * cv2.sum()
