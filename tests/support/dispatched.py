"""Counts what torch is asked to do: operations, and looks at a tensor's numbers."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

LOOKS = {"_local_scalar_dense", "equal", "nonzero", "unique", "masked_select"}
"""Operators that give numbers, or shapes made of numbers, to the host."""
READS = ("tolist", "numpy", "__array__", "cpu")
"""Methods of a tensor that do, some of them without an operator where it is on the host."""


class Dispatched(TorchDispatchMode):
    """Within the block `operations` counts operators and `reads` looks, outside of `left_out`."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.depth = 0

    @contextmanager
    def left_out(self) -> Iterator[None]:
        self.depth += 1
        yield
        self.depth -= 1

    def leaving_out(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, of which operations are not counted."""

        def call(*args: Any, **options: Any) -> Any:
            with self.left_out():
                return function(*args, **options)

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts within the block."""
        places = [(torch.Tensor, name) for name in READS] + [(get_accelerator(), "synchronize")]
        patches = [patch.object(*place, self._read(*place)) for place in places]
        with ExitStack() as stack:
            for each in patches:
                stack.enter_context(each)
            stack.enter_context(self)
            yield

    def _read(self, owner: object, name: str) -> Callable[..., Any]:
        real = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            self.reads[name] += 1
            return real(*args, **options)

        return call

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not self.depth and "record_function" not in name:  # a profiler's marks
            self.operations[name] += 1
        if name in LOOKS:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))
