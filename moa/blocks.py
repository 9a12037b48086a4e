"""Which blocks of a transformer get adapters: `all`, `every_K`, `last_K`, or their numbers."""

import re

from moa.errors import MoAConfigError

BLOCKS = re.compile(r"all|(every|last)_([1-9]\d*)")
"""The words that a `blocks` setting may be."""


def select_blocks(blocks: str | tuple[int, ...], depth: int) -> list[int]:
    """The block numbers that a `blocks` setting selects in a model of `depth` blocks.

    Raises:
        MoAConfigError: a listed block does not exist, or `last_K` asks for more than there are.
    """
    if not isinstance(blocks, str):
        bad = [b for b in blocks if not 0 <= b < depth]
        if bad or not blocks:
            raise MoAConfigError(
                f"moa.blocks: {list(blocks)}; the model has blocks 0 to {depth - 1}, list one or "
                "more of them"
            )
        return sorted(set(blocks))
    match = BLOCKS.fullmatch(blocks)
    if match is None:
        raise MoAConfigError(f"moa.blocks: {blocks!r}; legal are all, every_K, last_K, or a list")
    if blocks == "all":
        return list(range(depth))
    number = int(match[2])
    if match[1] == "every":
        return list(range(0, depth, number))
    if number > depth:
        raise MoAConfigError(f"moa.blocks: {blocks!r}; the model has only {depth} blocks")
    return list(range(depth - number, depth))
