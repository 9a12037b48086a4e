"""The loss as a function of the trained weights around a point: curvature, sharpness, slices.

The loss is the mean cross-entropy over fixed samples, in evaluation mode: no gate noise, no
augmentation, no balance loss. w is the vector of all trainables, n its length.

A router's choice is discrete. Within a region of weight space in which no sample's tokens change
experts the loss is smooth, and the derivatives here are those of that region: the chosen gates'
values vary, the choice does not. The Hessian knows nothing of the steps between regions; sharpness
and slices are differences of losses and see them.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

Samples = Sequence[tuple[Tensor, Tensor]]
"""Batches of images and class numbers."""


class Surface:
    """The loss of a model over fixed samples, around its weights.

    Args:
        model: the model; what requires a gradient is w.
        samples: on the model's device.

    Attributes:
        weights: w at the point, float [n].
    """

    def __init__(self, model: nn.Module, samples: Samples) -> None:
        self.model, self.samples = model.eval(), samples
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        self.weights = parameters_to_vector(self.parameters).detach().clone()
        self.number = sum(len(labels) for _, labels in samples)

    def _parts(self, weights: Tensor) -> Iterator[Tensor]:
        """The loss at w = `weights`, batch by batch."""
        pieces = torch.split(weights, [p.numel() for p in self.parameters])
        shaped = [w.view_as(p) for w, p in zip(pieces, self.parameters, strict=True)]
        named = dict(zip(self.names, shaped, strict=True))
        with sdpa_kernel(SDPBackend.MATH):  # deterministic, and can be derived twice
            for images, labels in self.samples:
                scores = functional_call(self.model, named, (images,))
                yield F.cross_entropy(scores, labels, reduction="sum") / self.number

    @torch.no_grad()
    def loss(self, weights: Tensor) -> float:
        """The loss at w = `weights`."""
        return float(sum(part.double() for part in self._parts(weights)))

    def gradient(self, weights: Tensor) -> Tensor:
        """The gradient at w = `weights`, [n]."""
        w, total = weights.detach().requires_grad_(), torch.zeros_like(weights)
        for part in self._parts(w):
            total += torch.autograd.grad(part, w)[0]
        return total

    def curvature(self, direction: Tensor) -> Tensor:
        """The Hessian at the point times `direction`, [n]."""
        w, total = self.weights.detach().requires_grad_(), torch.zeros_like(direction)
        for part in self._parts(w):
            (first,) = torch.autograd.grad(part, w, create_graph=True)
            total += torch.autograd.grad((first * direction).sum(), w)[0]
        return total


def top_eigenvalues(
    surface: Surface, number: int, seed: int, tolerance: float = 1e-3
) -> tuple[list[float], int]:
    """The Hessian's largest eigenvalues, by Lanczos iteration (scipy's `eigsh`).

    There may be fewer than n; `seed` draws the vector to start from, the `tolerance` is relative.

    Returns:
        The eigenvalues, largest first, and how many products with the Hessian they took.
    """
    products, n = 0, len(surface.weights)

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        direction = torch.from_numpy(vector.reshape(-1)).to(surface.weights)
        return surface.curvature(direction).double().cpu().numpy()

    start = np.random.default_rng(seed).standard_normal(n)
    operator = LinearOperator((n, n), matvec=product, dtype=np.float64)
    found = eigsh(
        operator, k=number, which="LA", v0=start, tol=tolerance, return_eigenvectors=False
    )
    return sorted(found.tolist(), reverse=True), products


def adaptive_sharpness(surface: Surface, radius: float, steps: int = 10) -> float:
    """How much the loss can rise if every weight may change in proportion to its own size.

    max over u in R^n with |u|_2 <= radius of L(w + |w| u) - L(w), products by element: the adaptive
    sharpness of Kwon et al., "ASAM" (ICML 2021), with p = 2 and T_w = diag(|w|). It is the same for
    all weights that give the same function by scaling elements, such as (c up, down / c) of a LoRA
    expert, which plain sharpness and the Hessian are not. Weights that are zero cannot move.

    The maximum is searched from u = 0 by ascent along the normalised gradient, in steps of
    2 radius / steps, back onto the ball after each; the best loss on the way counts. So the result
    is a lower bound, exact for a linear loss.
    """
    weights, scale = surface.weights, surface.weights.abs()
    start = best = surface.loss(weights)
    u = torch.zeros_like(weights)
    for _ in range(steps):
        slope = scale * surface.gradient(weights + scale * u)
        length = slope.norm()
        if length == 0:
            break
        u = u + 2 * radius / steps * slope / length
        u = u * min(1.0, radius / float(u.norm()))
        best = max(best, surface.loss(weights + scale * u))
    return best - start


def random_direction(surface: Surface, seed: int) -> Tensor:
    """A Gaussian direction whose filters are as long as those of the weights, [n].

    After Li et al., "Visualizing the Loss Landscape of Neural Nets" (NeurIPS 2018): a filter is a
    slice along a tensor's first dimension; tensors of one dimension (biases, temperatures) stay
    fixed.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for parameter in surface.parameters:
        weights = parameter.detach()
        noise = torch.randn(weights.shape, generator=generator).to(weights)
        if weights.dim() < 2:
            parts.append(torch.zeros_like(weights))
            continue
        flat, wanted = noise.flatten(1), weights.flatten(1).norm(dim=1, keepdim=True)
        parts.append(flat / flat.norm(dim=1, keepdim=True) * wanted)
    return parameters_to_vector(parts)


def slice_along(surface: Surface, direction: Tensor, places: Sequence[float]) -> list[float]:
    """The losses at w + t `direction` for each t in `places`."""
    return [surface.loss(surface.weights + place * direction) for place in places]
