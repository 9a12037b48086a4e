"""What numbers settings may be; a value beyond is told in one line that names what is legal."""

from collections.abc import Callable

Limit = tuple[str, Callable[[float], bool]]
"""What is legal in words, and whether a number is."""

ABOVE_0: Limit = ("a finite number > 0", lambda n: 0 < n < float("inf"))
FROM_0: Limit = ("a finite number >= 0", lambda n: 0 <= n < float("inf"))
FROM_1: Limit = ("a finite number >= 1", lambda n: 1 <= n < float("inf"))
SHARE: Limit = ("a number >= 0 and < 1", lambda n: 0 <= n < 1)
SECONDS: Limit = ("seconds >= 0", FROM_0[1])
NUMBER: Limit = ("a whole number >= 1", lambda n: n >= 1)
COUNT: Limit = ("a whole number from 1 to 2^63 - 1", lambda n: 1 <= n < 2**63)
SEED: Limit = ("a whole number from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)


def out_of_range(section: str, config: object, **limits: Limit) -> list[str]:
    """A line for each setting of a section, by its name, that is beyond its limit."""
    return [
        f"{section}.{name}: {getattr(config, name)}; must be {words}"
        for name, (words, is_legal) in limits.items()
        if not is_legal(getattr(config, name))
    ]
