"""Random numbers that are a function of (seed, step, layer, position in the global batch).

Whoever computes a token draws the same numbers for it: on one process or many, in a forward or in a
recomputation of it, on a CPU or a GPU, compiled or not. The generator is a hash of a counter, as in
counter-based generators (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

Letters: N rows (tokens), K columns.
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
    """

    seed: int
    step: int
    first: int


def noise_keys(position: RoutingPosition, num_layers: int) -> Tensor:
    """One key per layer, [num_layers, KEY_WORDS] int64, on the CPU."""
    rows = []
    for layer in range(num_layers):
        text = f"routing noise/{position.seed}/{position.step}/{layer}".encode()
        digest = hashlib.blake2b(text, digest_size=16).digest()
        words = [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 16, 4)]
        rows.append([*words, position.first])
    return torch.tensor(rows, dtype=torch.int64)


def fresh_key(device: torch.device) -> Tensor:
    """A key [KEY_WORDS] from torch's own generator, for a layer used outside a trainer."""
    key = torch.randint(_WORD + 1, (KEY_WORDS,), device=device)
    return key * (torch.arange(KEY_WORDS, device=device) < KEY_WORDS - 1)  # first image: 0


def normal(key: Tensor, num_images: int, tokens: int, columns: int) -> Tensor:
    """Standard normal numbers [N, K] in fp32, N = num_images * tokens, by Box and Muller."""
    counter = _counter(key, num_images, tokens, columns)
    drawn = _unit(counter, key[1:3, None, None])  # [2, N, K] at once: half the operations
    return (-2.0 * drawn[0].log()).sqrt() * (2.0 * math.pi * drawn[1]).cos()


def uniform(key: Tensor, num_images: int, tokens: int, columns: int) -> Tensor:
    """Numbers in (0, 1] as [N, K] in fp32, independent of those of `normal`."""
    return _unit(_counter(key, num_images, tokens, columns), key[3])


def _counter(key: Tensor, num_images: int, tokens: int, columns: int) -> Tensor:
    """Hash [N, K] of each number's place in the global batch."""
    size = num_images * tokens * columns
    place = torch.arange(size, device=key.device) + key[4] * (tokens * columns)
    return _mix((place & _WORD) ^ key[0]).view(num_images * tokens, columns)


def _unit(counter: Tensor, word: Tensor) -> Tensor:
    """Uniform in (0, 1], fp32."""
    return (_mix(counter ^ word) + 0.5).float() * 2.0**-32


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words (held in int64) that sends near words far apart."""
    x = ((x ^ (x >> 16)) * _MULTIPLIERS[0]) & _WORD
    x = ((x ^ (x >> 15)) * _MULTIPLIERS[1]) & _WORD
    return x ^ (x >> 15)
