"""Image bytes to pixels: which decoder reads what, and what happens to incomplete files."""

import io
import warnings
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg

from shards.config import Decode, Truncated

Pixels: TypeAlias = torch.Tensor | Image.Image
"""uint8 tensor [3, h, w] in RGB, or (with `decode: pil`) Pillow's RGB image."""

_JPEG_MAGIC = b"\xff\xd8\xff"
_JPEG_FRAMES = {bytes([code]) for code in range(0xC0, 0xD0) if code not in (0xC4, 0xC8, 0xCC)}


class Decoded(NamedTuple):
    """Pixels, and whether the file was incomplete and its missing part left grey."""

    pixels: Pixels
    truncated: bool


class Decoder:
    """Decodes image files of any common format; EXIF rotation is ignored, as in DomainBed.

    Args:
        decode: `auto` reads JPEG with torchvision, and everything else, and any JPEG it refuses,
            with Pillow; `pil` uses Pillow alone and leaves its image as it is, so that later steps
            run in Pillow too, as they do in DomainBed.
        truncated: `keep` takes an incomplete file for what can be read of it, as DomainBed does;
            `substitute` refuses it.
    """

    def __init__(self, decode: Decode = "auto", truncated: Truncated = "keep") -> None:
        self.decode = decode
        self.truncated = truncated

    def __call__(self, data: bytes) -> Decoded:
        """Decode one file.

        Args:
            data: The file's bytes.

        Returns:
            The pixels.

        Raises:
            ValueError: If no decoder can read it, or it is incomplete and that is not tolerated.
        """
        try:
            if self.decode == "pil":
                return Decoded(_open_with_pillow(data), False)
            return Decoded(decode_image(data), False)
        except ValueError:
            if self.truncated != "keep":
                raise
            image = _open_incomplete(data)
            return Decoded(image if self.decode == "pil" else _to_tensor(image), True)


def decode_image(data: bytes) -> torch.Tensor:
    """Decode a complete image file of any common format.

    Args:
        data: The file's bytes.

    Returns:
        uint8 tensor [3, H, W], RGB.

    Raises:
        ValueError: If no decoder can read it.
    """
    if data.startswith(_JPEG_MAGIC) and not _is_bomb(data):
        try:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            decoded: torch.Tensor = decode_jpeg(buffer, mode=ImageReadMode.RGB)
            return decoded
        except RuntimeError:
            pass  # Pillow reads some files that torchvision refuses, and explains the others
    return _to_tensor(_open_with_pillow(data))


def undecodable_placeholder() -> torch.Tensor:
    """Make the image that stands for one that cannot be decoded but must be counted.

    Returns:
        uint8 tensor [3, 32, 32], mid-grey.
    """
    return torch.full((3, 32, 32), 127, dtype=torch.uint8)


def _is_bomb(data: bytes) -> bool:
    """Tell whether a JPEG is so large that Pillow refuses it, which torchvision would not."""
    return Image.MAX_IMAGE_PIXELS is not None and _jpeg_pixels(data) > 2 * Image.MAX_IMAGE_PIXELS


def _jpeg_pixels(data: bytes) -> int:
    """Read height times width from a JPEG's frame header; 0 if there is none."""
    place = 2
    while data[place : place + 1] == b"\xff":
        marker = data[place + 1 : place + 2]
        if marker in _JPEG_FRAMES:
            height, width = data[place + 5 : place + 7], data[place + 7 : place + 9]
            return int.from_bytes(height) * int.from_bytes(width)
        filling = marker == b"\xff"  # any number of these may stand before a marker
        place += 1 if filling else 2 + int.from_bytes(data[place + 2 : place + 4])
    return 0


def _open_with_pillow(data: bytes) -> Image.Image:
    """Decode with Pillow to RGB; ValueError if it cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF and palette oddities that change no pixel
            with Image.open(io.BytesIO(data)) as image:
                return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError("not a readable image (of no known format)") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable image ({error})") from error


def _open_incomplete(data: bytes) -> Image.Image:
    """Decode with Pillow what there is of a file; ValueError if that is nothing."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # Pillow has no other way to say it
    try:
        return _open_with_pillow(data)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert Pillow's RGB image to uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
