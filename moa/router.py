"""The token router of Mixture-of-Adapters and its load balancing loss (arXiv 2310.11031).

Letters: N tokens, D in, M router dimension, E experts.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_LOG_SCALE = math.log(100.0)
"""The logits' scale exp(temperature) is capped at 100."""


@dataclass(frozen=True)
class Routing:
    """What the router decided for N tokens.

    Attributes:
        gates: [N, E] weight of each expert, zero where it was not chosen.
        probs: [N, E] noise-free softmax.
        top_prob: [N] largest probability of the softmax that chose (noisy in training).
    """

    gates: Tensor
    probs: Tensor
    top_prob: Tensor


class CosineRouter(nn.Module):
    """Routes by the cosine between a projected token and one embedding per expert.

    logits = exp(min(temperature, ln 100)) * cos(proj(x), embed_e). The scale starts at 2.
    Arithmetic is in fp32 or wider, whatever the dtype of the tokens, because a rounded logit
    changes which expert wins.

    Args:
        dim: D.
        num_experts: E.
        router_dim: M.
        top_k: experts kept per token.
        like: tensor whose dtype and device the parameters take.
    """

    def __init__(self, dim: int, num_experts: int, router_dim: int, top_k: int, like: Tensor):
        super().__init__()
        self.top_k = top_k
        self.proj = nn.Linear(dim, router_dim, device=like.device, dtype=like.dtype)
        self.embed = nn.Parameter(like.new_empty(router_dim, num_experts).normal_(0.0, 0.01))
        self.temperature = nn.Parameter(like.new_full((1,), math.log(1 / 0.5)))

    def logits(self, x: Tensor) -> Tensor:
        """Scaled cosines [N, E] of tokens `x` [N, D], fp32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        device = x.device.type
        autocasts = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if autocasts else nullcontext():
            z = F.linear(x.to(wide), self.proj.weight.to(wide), self.proj.bias.to(wide))
            cosine = F.normalize(z, dim=-1) @ F.normalize(self.embed.to(wide), dim=0)
        return self.temperature.to(wide).clamp(max=MAX_LOG_SCALE).exp() * cosine

    def forward(self, x: Tensor, noise: Tensor | None) -> Routing:
        """Chooses `top_k` experts for every token; weights are not renormalised.

        Args:
            x: tokens [N, D].
            noise: [N, E] to add to the logits before choosing, or None.
        """
        logits = self.logits(x)
        probs = logits.softmax(-1)
        chosen = probs if noise is None else (logits + noise.to(logits.dtype)).softmax(-1)
        top, ids = chosen.topk(self.top_k, dim=-1)
        gates = torch.zeros_like(chosen).scatter(-1, ids, top)
        return Routing(gates, probs, top[..., 0])


def balance_counts(routing: Routing) -> Tensor:
    """Importance and smooth load of each expert, summed over tokens, as [2, E].

    importance_e = sum of the noise-free softmax; load_e = sum of Phi((p_e - p_max) * E), with p
    noise-free and p_max the chosen maximum. Sums add up over ranks, so the loss can be global.
    """
    num_experts = routing.probs.shape[-1]
    margin = (routing.probs - routing.top_prob.unsqueeze(-1)) * num_experts
    load = torch.special.ndtr(margin)
    return torch.stack([routing.probs.sum(0), load.sum(0)])


def balance_loss(counts: Tensor) -> Tensor:
    """1/2 [CV^2(importance) + CV^2(load)] from counts [..., 2, E], summed over leading axes.

    CV^2 is the unbiased variance over experts divided by (mean^2 + 1e-10).
    """
    cv2 = counts.var(-1, unbiased=True) / (counts.mean(-1).square() + 1e-10)
    return 0.5 * cv2.sum()
