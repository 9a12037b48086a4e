"""Imports of large libraries, without a search for garbage meanwhile or among them afterwards."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def many_imports() -> Iterator[None]:
    """What is imported within makes objects by the hundred thousand and no garbage.

    A collector that looks for some takes a fifth of the time, and again in each collection that
    DeepSpeed asks for while it makes an engine (four at ZeRO-1 in bf16).
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()
