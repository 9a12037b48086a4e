"""What a step found out, on its way from the device: read once later steps are under way."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BEHIND = 2
"""Steps that may be under way while nothing of them has been read.

More would not help: a device takes about a thousand launches in advance, less than a step's.
"""


class _Sent(NamedTuple):
    numbers: Tensor
    """On the host once the event has come."""
    event: torch.cuda.Event | None
    use: Callable[[list[float]], object]


class Behind:
    """Vectors in the order in which they were sent."""

    def __init__(self) -> None:
        self._sent: deque[_Sent] = deque()

    def send(self, numbers: Tensor, use: Callable[[list[float]], object]) -> None:
        """Begins to copy a vector to the host, for `use` to get it; waits for nothing."""
        event = None
        here = numbers.to("cpu", non_blocking=True)  # into pinned memory
        if numbers.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._sent.append(_Sent(here, event, use))

    def read(self, leave: int = 0) -> None:
        """Waits for all but the last `leave` vectors, and has them used one by one.

        After an error in that, what came later is forgotten.
        """
        while len(self._sent) > leave:
            numbers, event, use = self._sent.popleft()
            if event is not None:
                event.synchronize()  # of this step alone, not of those after it
            try:
                use(numbers.tolist())
            except Exception:
                self._sent.clear()
                raise
