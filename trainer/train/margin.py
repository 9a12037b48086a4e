"""A margin by the similarity of classes (CLIPood's MMS, arXiv 2302.00864)."""

from collections.abc import Callable

from torch import Tensor, nn

from moa.layers.head import CosineHead
from moa.model.injection import classifier


def margin_of(model: nn.Module, strength: float) -> Callable[[Tensor, Tensor], Tensor]:
    """What training makes of a model's scores [N, C] and labels [N]; evaluation takes no part.

    s cos(f, t_c) becomes s (cos(f, t_c) - `strength` cos(t_y, t_c)), y the label: its own class
    must win by more over all others, the less they are like it. Without a strength scores stay.
    """
    if not strength:
        return lambda scores, labels: scores
    head = classifier(model)
    assert isinstance(head, CosineHead), "the configuration was checked"
    return lambda scores, labels: scores - strength * head.similarity(labels)
