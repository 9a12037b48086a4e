"""Files that are no ordinary pictures: deep grey, damaged, too large, of other formats."""

import io
import random
import struct
import sys
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from shards.pixels.decoding import Decoder, decode_image
from shards.pixels.image_file import FORMATS, SCALED, is_too_large, open_rgb

PICTURE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (24, 32, 3), dtype=np.uint8))
RAMP = np.linspace(0, 20_000, 24 * 32).astype(np.uint16).reshape(24, 32)


def encoded(kind: str, image: Image.Image = PICTURE, **options: object) -> bytes:
    with io.BytesIO() as stream:
        image.save(stream, kind, **options)
        return stream.getvalue()


def tiff_of_12_bits(levels: list[int]) -> bytes:
    """One line of grey, two levels in three bytes."""
    pairs = zip(levels[::2], levels[1::2], strict=True)
    pixels = b"".join((a << 12 | b).to_bytes(3, "big") for a, b in pairs)
    tags = {256: len(levels), 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1,
            279: len(pixels)}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + struct.pack(
        "<H", len(tags)
    ) + entries + bytes(4)  # fmt: skip


def white_is_zero() -> dict[str, object]:
    tags = ImageFileDirectory_v2()
    tags[262] = 0
    return {"tiffinfo": tags}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_scaled(kind: str) -> None:
    data = encoded(kind, Image.fromarray(RAMP))
    for found in (decode_image(data)[0].numpy(), np.asarray(Decoder("pil")(data).pixels)[..., 0]):
        assert (found == np.round(RAMP / 257)).all()
    assert SCALED in open_rgb(data).info
    assert SCALED not in open_rgb(encoded(kind)).info


def test_grey_of_other_depths_is_scaled_or_refused() -> None:
    assert decode_image(tiff_of_12_bits([0, 4095, 2048, 1024]))[0].tolist() == [[0, 255, 128, 64]]
    negative = encoded("TIFF", Image.fromarray(RAMP), **white_is_zero())
    assert (decode_image(negative)[0].numpy() == np.round((65535 - RAMP) / 257)).all()
    for levels in (RAMP / np.float32(65535), RAMP.astype(np.int32)):
        data = encoded("TIFF", Image.fromarray(levels))
        for decoder in (Decoder(), Decoder("pil")):
            with pytest.raises(ValueError, match="grey levels of 32 bits without a known range; "):
                decoder(data)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_with_too_many_pixels_is_refused_by_all(progressive: bool) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a segment before the frame header"
    data = encoded("JPEG", progressive=progressive, exif=exif)
    filled = data[:2] + b"\xff\xff" + data[2:]  # as the format allows
    strange = data[:20] + b"?" + data[20:]  # what Pillow does not read, libjpeg does
    number = PICTURE.width * PICTURE.height
    for legal in (data, filled, strange):
        assert decode_image(legal, max_pixels=number).shape == (3, PICTURE.height, PICTURE.width)
        assert is_too_large(legal, number - 1)
    for decode in ("auto", "pil"):
        for large in (data, filled, encoded("PNG"), encoded("WEBP")):
            with pytest.raises(ValueError, match=rf"\({number} pixels\), more than max_pixels = "):
                Decoder(decode, max_pixels=number - 1)(large)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="not a readable image"):
            Decoder(decode, max_pixels=number - 1)(strange)  # type: ignore[arg-type]
    assert Image.MAX_IMAGE_PIXELS == 89_478_485, "Pillow's limit is back where it was"


def test_other_formats_are_unknown() -> None:
    others = set(Image.OPEN) - set(FORMATS)
    assert {"EPS", "DDS", "WMF"} <= others
    for kind in ("EPS", "DDS", "ICO", "TGA", "PCX"):
        with pytest.raises(ValueError, match="of no known format"):
            decode_image(encoded(kind))


def seeds() -> list[bytes]:
    """A file of every format and of some kinds within each, also of formats that are refused."""
    grey, deep = PICTURE.convert("L"), Image.fromarray(RAMP)
    packed = ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg")
    return [
        *(encoded(kind) for kind in (*FORMATS, "EPS", "DDS", "ICO", "JPEG2000")),
        *(encoded("TIFF", compression=name) for name in packed),
        *(encoded(kind, deep) for kind in ("PNG", "TIFF", "PPM")),
        encoded("TIFF", PICTURE.convert("1"), compression="group4"),
        encoded("JPEG", progressive=True), encoded("JPEG", PICTURE.convert("CMYK")),
        encoded("MPO", save_all=True, append_images=[PICTURE]), encoded("PPM", grey),
        encoded("PNG", PICTURE.convert("P")), encoded("WEBP", lossless=True),
        encoded("GIF", save_all=True, append_images=[PICTURE.rotate(90)]),
    ]  # fmt: skip


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The file with some bytes changed, taken out or put in, of its head more often."""
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        place = draw.randrange(draw.choice((64, len(data))))
        few = draw.randbytes(draw.randrange(1, 9))
        change: Callable[[], tuple[int, bytes]] = draw.choice((
            lambda: (1, few[:1]), lambda: (len(few), b""), lambda: (0, few),  # noqa: B023
            lambda: (4, draw.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))),
        ))  # fmt: skip
        length, new = change()
        result[place : place + length] = new
    return bytes(result)


def test_damaged_files_raise_one_kind_of_error_and_start_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    started: list[str] = []
    watching = True

    def hook(event: str, _: object) -> None:
        if watching and event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            started.append(event)

    sys.addaudithook(hook)
    draw, files, refused = random.Random(15), seeds(), 0
    decoders = [Decoder(d, t, 10_000) for d in ("auto", "pil") for t in ("keep", "substitute")]  # type: ignore[arg-type]
    for number in range(4000):
        data = mutated(files[number % len(files)], draw)
        try:
            decoders[number % 4](data)
        except ValueError:
            refused += 1
    watching = False
    capfd.readouterr()  # libtiff and libjpeg talk
    assert 1000 < refused < 3900
    assert started == []
