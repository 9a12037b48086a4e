"""Random numbers that are a function of (seed, step, layer, position in the global batch).

Whoever computes a token draws the same numbers for it: on one process or many, in a forward or in a
recomputation of it, on a CPU or a GPU, compiled or not. The generator is a hash of a counter, as in
counter-based generators (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

Letters: L layers, N rows (tokens), K columns.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

KEY_WORDS = 5
"""A noise key holds four words of 32 bits and the position of the first image."""

_WORD = 2**32 - 1
# A 32-bit mixer whose multipliers are below 2^31: products stay within int64 (constants found by
# an exhaustive search for low bias, github.com/skeeto/hash-prospector).
_MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)


@dataclass
class RoutingPosition:
    """Where the running micro-batch stands, so that random numbers do not depend on the world size.

    Attributes:
        seed: the run's seed.
        step: global step; with gradient accumulation its micro-batches share the step.
        first: position of the local micro-batch's first image in the global batch.
        images: images of the local micro-batch, which some backbones cut into windows before a
            layer sees them; None takes the first axis of a layer's input.
    """

    seed: int
    step: int
    first: int
    images: int | None = None


def images_and_tokens(x: Tensor, images: int | None) -> tuple[int, int]:
    """How many images a layer's input [B, ..., D] belongs to, and how many tokens each of them has.

    Windows (Swin, SAM) lie along the first axis, those of an image behind each other.
    """
    rows = x.shape[:-1].numel()
    if not images or rows % images:
        return x.shape[0], x.shape[1:-1].numel()
    return images, rows // images


def noise_keys(position: RoutingPosition, num_layers: int) -> Tensor:
    """One key per layer, or whatever else draws, [num_layers, KEY_WORDS] int64, on the CPU."""
    rows = []
    for layer in range(num_layers):
        text = f"routing noise/{position.seed}/{position.step}/{layer}".encode()
        digest = hashlib.blake2b(text, digest_size=16).digest()
        words = [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 16, 4)]
        rows.append([*words, position.first])
    return torch.tensor(rows, dtype=torch.int64)


class LayersNoise:
    """Gate noise of all layers, drawn at once from their keys [L, KEY_WORDS].

    On a GPU one layer's would cost as many launches.
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys
        self._drawn: dict[tuple[int, int, int], Tensor] = {}

    def normal(self, layer: int, num_images: int, tokens: int, columns: int) -> Tensor:
        """What `normal` gives for the layer's key, [N, K]."""
        shape = (num_images, tokens, columns)
        if shape not in self._drawn:
            self._drawn[shape] = normal(self.keys, *shape)
        return self._drawn[shape][layer]


def fresh_key(device: torch.device) -> Tensor:
    """A key [KEY_WORDS] from torch's own generator, for a layer used outside a trainer."""
    key = torch.randint(_WORD + 1, (KEY_WORDS,), device=device)
    return key * (torch.arange(KEY_WORDS, device=device) < KEY_WORDS - 1)  # first image: 0


def normal(key: Tensor, num_images: int, tokens: int, columns: int) -> Tensor:
    """Standard normal numbers in fp32, for N = num_images * tokens, by Box and Muller.

    A key [KEY_WORDS] gives [N, K]; one per layer, [L, KEY_WORDS], gives [L, N, K].
    """
    radius, angle = _units(key, slice(1, 3), num_images, tokens, columns).unbind(-3)
    return (-2.0 * radius.log()).sqrt() * (2.0 * math.pi * angle).cos()


def uniform(key: Tensor, num_images: int, tokens: int, columns: int) -> Tensor:
    """Numbers in (0, 1] as [N, K] in fp32, independent of those of `normal`."""
    return _units(key, slice(3, 4), num_images, tokens, columns)[0]


def _units(key: Tensor, words: slice, num_images: int, tokens: int, columns: int) -> Tensor:
    """Numbers in (0, 1], fp32, [..., W, N, K]: a set for each of W words of the key.

    They are hashes of a number's place in the global batch.
    """
    key, size = key.unsqueeze(-1), num_images * tokens * columns
    place = torch.arange(size, device=key.device) + key[..., 4:, :] * (tokens * columns)
    counter = _mix((place & _WORD) ^ key[..., :1, :])  # [..., 1, N K]
    drawn = (_mix(counter ^ key[..., words, :]).float() + 0.5) * 2.0**-32
    return drawn.view(*drawn.shape[:-1], num_images * tokens, columns)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words (held in int64) that sends near words far apart."""
    x = ((x ^ (x >> 16)) * _MULTIPLIERS[0]) & _WORD
    x = ((x ^ (x >> 15)) * _MULTIPLIERS[1]) & _WORD
    return x ^ (x >> 15)
