"""Image bytes to pixels: which decoder reads what, and what happens to incomplete files."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from shards.config import MAX_PIXELS, Decode, Truncated
from shards.pixels.image_file import is_too_large, open_rgb

Pixels: TypeAlias = torch.Tensor | Image.Image
"""uint8 tensor [3, h, w] in RGB, or (with `decode: pil`) Pillow's RGB image."""

_JPEG_MAGIC = b"\xff\xd8\xff"


class Decoded(NamedTuple):
    """Pixels, and whether the file was incomplete and its missing part left grey."""

    pixels: Pixels
    truncated: bool


@dataclass(frozen=True)
class Decoder:
    """Decodes image files of any common format; EXIF rotation is ignored, as in DomainBed.

    Args:
        decode: `auto` reads JPEG with torchvision, and everything else, and any JPEG it refuses,
            with Pillow; `pil` uses Pillow alone and leaves its image as it is, so that later steps
            run in Pillow too, as they do in DomainBed.
        truncated: `keep` takes an incomplete file for what can be read of it, as DomainBed does;
            `substitute` refuses it.
        max_pixels: larger images are refused.
    """

    decode: Decode = "auto"
    truncated: Truncated = "keep"
    max_pixels: int = MAX_PIXELS

    def __call__(self, data: bytes) -> Decoded:
        """Decode one file.

        Raises `ValueError`: no decoder can read it, it is too large, or it is incomplete and that
        is not tolerated.
        """
        decode = _with_pillow if self.decode == "pil" else decode_image
        try:
            return Decoded(decode(data, max_pixels=self.max_pixels), False)
        except ValueError:
            if self.truncated != "keep":
                raise
            image = _with_pillow(data, incomplete=True, max_pixels=self.max_pixels)
            return Decoded(image if self.decode == "pil" else to_tensor(image), True)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode a complete image file of any common format to uint8 [3, H, W], RGB.

    Raises `ValueError`: no decoder can read it, or it has more pixels than allowed.
    """
    # torchvision itself knows no limit
    if data.startswith(_JPEG_MAGIC) and not is_too_large(data, max_pixels):
        try:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            decoded: torch.Tensor = decode_jpeg(buffer, mode=ImageReadMode.RGB)
            return decoded
        except RuntimeError:
            pass  # Pillow reads some files that torchvision refuses, and explains the others
    return to_tensor(_with_pillow(data, max_pixels=max_pixels))


def undecodable_placeholder() -> torch.Tensor:
    """The mid-grey image, uint8 [3, 32, 32], for one that cannot be decoded but must be counted."""
    return torch.full((3, 32, 32), 127, dtype=torch.uint8)


def _with_pillow(data: bytes, *, max_pixels: int, incomplete: bool = False) -> Image.Image:
    try:
        return open_rgb(data, incomplete=incomplete, max_pixels=max_pixels)
    except ValueError as error:
        raise ValueError(f"not a readable image ({error})") from error


def to_tensor(image: Pixels) -> torch.Tensor:
    """Convert Pillow's RGB image to uint8 [3, H, W]; leave a tensor as it is."""
    if isinstance(image, torch.Tensor):
        return image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
