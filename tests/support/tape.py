"""A CUDA graph's stand-in on a CPU: what a piece of work asked of torch, done again without Python.

As a graph does, it repeats the operations over the very tensors of the recording: what Python would
have changed meanwhile stays as it was.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"_local_scalar_dense", "equal", "nonzero", "unique", "masked_select"}


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records within the block; every tensor keeps its place afterwards."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = [t for t in _tensors(result) if t.untyped_storage()._cdata not in given]
        # Detached, so that nobody can tell them from the memory that they are.
        self.done.append((func, args, kwargs or {}, [t.detach() for t in made]))
        return result

    def replay(self) -> None:
        """Does it again."""
        with torch.no_grad():
            for func, args, kwargs, places in self.done:
                given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
                result = func(*args, **kwargs)
                made = [t for t in _tensors(result) if t.untyped_storage()._cdata not in given]
                for place, value in zip(places, made, strict=True):
                    place.copy_(value)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def taped(work: Callable[[], object], _: torch.device) -> Callable[[], object]:
    """In the place of `trainer.train.graphed.captured`: warms up, records, gives the replay."""
    for _ in range(2):
        work()
    with Tape() as tape:
        work()
    # A capture computes nothing: what it left is to be had after a replay only.
    for *_, places in tape.done:
        for place in places:
            if place.is_floating_point():
                place.fill_(torch.nan)
    return tape.replay
