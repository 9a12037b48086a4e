"""The six styles of the embedded digits, drawn in integer arithmetic.

Only integers, and random words from `shards.order`, go into a pixel, so every machine and library
version draws the same bytes. Arrays: pixels int64 [8, 8] in 0..16 (the scanned digit), ink int64
[32, 32] in 0..255 (how much of a place is covered), colours int64 [3], pictures [32, 32, 3].
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from shards.randomness import Int64Array, hash64, random_words

DRAWING_VERSION = 2
SIZE = 32

_GRID = 2 * np.arange(SIZE, dtype=np.int64) - (SIZE - 1)  # pixel centres, in half pixels
_PAD = 12  # empty places around the scan, so that no pixel looks outside
_HUES = 6 * 256


class Dice:
    """Random integers, the same for the same key on every machine.

    Args:
        key: What the numbers are for, as from `shards.order.hash64`.
    """

    def __init__(self, key: int) -> None:
        self._key = key
        self._count = 0

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Draw the next random words.

        Args:
            count: How many.

        Returns:
            uint64 array [count].
        """
        counters = np.arange(self._count, self._count + count, dtype=np.uint64)
        self._count += count
        return random_words(self._key, counters)

    def between(self, low: int, high: int) -> int:
        """Draw an integer.

        Args:
            low: Smallest value.
            high: Largest value.

        Returns:
            A number in [low, high].
        """
        return low + int(self.words(1)[0]) % (high - low + 1)


def draw(pixels: Int64Array, style: str, number: int) -> npt.NDArray[np.uint8]:
    """Draw one digit.

    Args:
        pixels: int64 [8, 8] in 0..16, the scanned digit.
        style: One of `STYLES`.
        number: Number of the digit in the collection; with the style it fixes all random choices.

    Returns:
        uint8 [32, 32, 3], RGB.
    """
    dice = Dice(hash64("digits", DRAWING_VERSION, style, number))
    return STYLES[style](pixels, dice).astype(np.uint8)


def enlarge(pixels: Int64Array, dice: Dice, degrees: int = 0) -> Int64Array:
    """Enlarge a scan four times by cubic interpolation, moved by up to a pixel.

    Args:
        pixels: int64 [8, 8] in 0..16.
        dice: Source of the movement.
        degrees: Angle to turn the digit by, clockwise.

    Returns:
        Ink, int64 [32, 32] in 0..255.
    """
    cos = round(math.cos(math.radians(degrees)) * 2**16)
    sin = round(math.sin(math.radians(degrees)) * 2**16)
    middle = (7 * 2**16) // 2 + _PAD * 2**16
    shift_x, shift_y = (dice.between(-(2**14), 2**14) for _ in range(2))
    across, down = _GRID[None, :], _GRID[:, None]
    x = (across * cos + down * sin) // 8 + middle + shift_x  # in scan pixels x 2**16
    y = (down * cos - across * sin) // 8 + middle + shift_y
    padded = np.pad(pixels, _PAD)
    weights_x, weights_y = _cubic_weights(x), _cubic_weights(y)
    total = np.zeros((SIZE, SIZE), dtype=np.int64)
    for row in range(4):
        line = sum(
            weights_x[column] * padded[(y >> 16) + row - 1, (x >> 16) + column - 1]
            for column in range(4)
        )
        total += weights_y[row] * (line >> 17)
    return np.clip(total * 255 // 2**37, 0, 255)


def _cubic_weights(position: Int64Array) -> list[Int64Array]:
    """Give the Catmull-Rom weights of the four neighbours of each position, times 2**25."""
    t = (position >> 8) & 255
    one = 256
    return [
        -t * one**2 + 2 * t**2 * one - t**3,
        2 * one**3 - 5 * t**2 * one + 3 * t**3,
        t * one**2 + 4 * t**2 * one - 3 * t**3,
        -(t**2) * one + t**3,
    ]


def _sharpen(ink: Int64Array) -> Int64Array:
    """Make the edge of the strokes steeper."""
    return np.clip((ink - 80) * 2, 0, 255)


def _colour(hue: int, saturation: int, value: int) -> Int64Array:
    """Convert hue (0..1535, cyclic), saturation and value (0..255) to RGB."""
    offsets = np.array([5, 3, 1], dtype=np.int64) * 256
    sector = (hue + offsets) % _HUES
    ramp = np.clip(np.minimum(sector, 4 * 256 - sector), 0, 256)
    return value - value * saturation * ramp // (255 * 256)


def _mix(ink: Int64Array, front: Int64Array, back: Int64Array) -> Int64Array:
    """Lay ink of colour or picture `front` over colour or picture `back`."""
    share = ink[:, :, None]
    return (front * share + back * (255 - share) + 127) // 255


def _plain(pixels: Int64Array, dice: Dice) -> Int64Array:
    """Smooth light strokes on dark grey."""
    back, front = dice.between(8, 48), dice.between(200, 255)
    ink = enlarge(pixels, dice)
    return _mix(ink, np.full(3, front), np.full(3, back))


def _inverted(pixels: Int64Array, dice: Dice) -> Int64Array:
    """Dark ink on light coloured paper."""
    paper = _colour(dice.between(0, _HUES), dice.between(30, 90), dice.between(225, 255))
    ink_colour = _colour(dice.between(0, _HUES), dice.between(120, 255), dice.between(20, 70))
    return _mix(_sharpen(enlarge(pixels, dice)), ink_colour, paper)


def _outline(pixels: Int64Array, dice: Dice) -> Int64Array:
    """The edge of the strokes as a thin strong line around a pale inside, on white."""
    line = _colour(dice.between(0, _HUES), dice.between(200, 255), dice.between(60, 140))
    white = np.full(3, dice.between(240, 255))
    ink = enlarge(pixels, dice)
    edge = np.clip(330 - np.abs(ink - 90) * 5, 0, 255)
    return _mix(np.maximum(edge, _sharpen(ink) * 2 // 5), line, white)


def _coarse(pixels: Int64Array, dice: Dice) -> Int64Array:
    """The 8 x 8 scan itself in four flat levels of two strong colours."""
    hue = dice.between(0, _HUES)
    back = _colour(hue, dice.between(190, 255), dice.between(70, 150))
    front = _colour(hue + dice.between(512, 1024), dice.between(60, 200), 255)
    levels = (pixels * 3 + 8) // 16 * 85
    return _mix(np.kron(levels, np.ones((4, 4), dtype=np.int64)), front, back)


def _textured(pixels: Int64Array, dice: Dice) -> Int64Array:
    """A speckled digit over coloured stripes and scattered blocks."""
    across, down = np.arange(SIZE)[None, :], np.arange(SIZE)[:, None]
    hue = dice.between(0, _HUES)
    slope = across * dice.between(-2, 2) + down * dice.between(1, 3)
    stripes = (slope // dice.between(3, 6) % 2 * 255).astype(np.int64)
    back = _mix(stripes, _colour(hue, 200, dice.between(90, 120)), _colour(hue, 220, 60))
    for _ in range(5):
        left, top = dice.between(0, SIZE - 6), dice.between(0, SIZE - 6)
        block = _colour(dice.between(0, _HUES), dice.between(120, 255), dice.between(50, 130))
        back[top : top + dice.between(3, 9), left : left + dice.between(3, 9)] = block
    speckle = (dice.words(SIZE * SIZE).reshape(SIZE, SIZE) % np.uint64(256)).astype(np.int64)
    other = hue + dice.between(400, 1100)
    front = _mix(speckle, _colour(other, 60, 255), _colour(other, 150, 190))
    return _mix(_sharpen(enlarge(pixels, dice)), front, back)


def _rotated(pixels: Int64Array, dice: Dice) -> Int64Array:
    """A digit turned by up to 45 degrees, in colour on colour, light on dark or dark on light."""
    degrees = dice.between(-45, 45)
    hue = dice.between(0, _HUES)
    dark = _colour(hue, dice.between(150, 255), dice.between(40, 110))
    light = _colour(hue + dice.between(400, 1100), dice.between(60, 150), dice.between(215, 255))
    ink = _sharpen(enlarge(pixels, dice, degrees))
    return _mix(ink, dark, light) if dice.between(0, 1) else _mix(ink, light, dark)


STYLES: dict[str, Callable[[Int64Array, Dice], Int64Array]] = {
    "plain": _plain,
    "inverted": _inverted,
    "outline": _outline,
    "coarse": _coarse,
    "textured": _textured,
    "rotated": _rotated,
}
