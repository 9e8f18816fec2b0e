"""Image preparation against Pillow: polarity, modes, and damaged bytes."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from distmeta.errors import InputError
from distmeta.tasks.image_preparation import Preparation, prepare_image, scale_pixels


def encode(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def draw_stroke(size=105):
    """Return a white image with a dark stroke."""
    pixels = np.full((size, size), 255, np.uint8)
    pixels[20:80, 50:54] = 0
    return Image.fromarray(pixels)


def test_default_is_the_preparation_of_maml():
    one_bit = draw_stroke().convert("1")
    prepared = prepare_image(encode(one_bit), Preparation())
    expected = 1 - np.asarray(one_bit.convert("L").resize((28, 28), Image.Resampling.LANCZOS)) / 255
    assert prepared.dtype == np.uint8
    assert prepared.shape == (1, 28, 28)
    np.testing.assert_allclose(scale_pixels(prepared, Preparation().scale)[0], expected, atol=1e-6)
    assert prepared.max() >= 200
    assert prepared[0, 0, 0] == 0


def test_scaled_pixels_reach_exactly_one():
    scaled = scale_pixels(np.array([0, 255], np.uint8), 1 / 255)
    assert scaled.tolist() == [0.0, 1.0]
    assert scaled.dtype == np.float32


def test_ink_inverts_and_filters_differ():
    light = prepare_image(draw_stroke(), Preparation(ink="light"))
    assert np.array_equal(255 - light, prepare_image(draw_stroke(), Preparation(ink="dark")))
    filters = ("box", "nearest", "bilinear")
    results = {prepare_image(draw_stroke(), Preparation(filter=name)).tobytes() for name in filters}
    assert len(results) == 3


def test_every_image_mode_is_prepared():
    colour = Image.new("RGB", (10, 6), (255, 0, 0))
    prepared = prepare_image(encode(colour), Preparation(size=4, ink="light", channels=3))
    assert prepared.shape == (3, 4, 4)
    assert prepared[:, 0, 0].tolist() == [255, 0, 0]
    transparent = encode(Image.new("RGBA", (5, 5), (0, 0, 0, 0)))
    assert prepare_image(transparent, Preparation(size=5)).max() == 0  # it is paper, with either polarity
    assert prepare_image(transparent, Preparation(size=5, ink="light")).max() == 0
    wide = encode(Image.fromarray(np.full((5, 5), 0x8000, np.uint16)))
    assert prepare_image(wide, Preparation(size=5, ink="light")).max() == 0x80
    assert prepare_image(encode(colour, "JPEG"), Preparation()).shape == (1, 28, 28)


def test_preparation_survives_json():
    preparation = Preparation(size=32, filter="box", ink="light", channels=3, scale=0.1)
    assert Preparation.from_dict(json.loads(json.dumps(preparation.to_dict()))) == preparation


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sise": 3}, "preparation.sise: got an unknown key, did you mean 'size'"),
        ({"size": 0}, "preparation.size: got 0"),
        ({"size": 2.5}, "preparation.size"),
        ({"filter": "cubic"}, "preparation.filter: got 'cubic', expected lanczos or"),
        ({"channels": 2}, "preparation.channels"),
        ({"scale": 0}, "preparation.scale"),
        ({"ink": ["dark"]}, "preparation.ink"),
    ],
)
def test_wrong_preparation_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Preparation.from_dict(fields)


def test_damaged_images_are_refused():
    whole = encode(draw_stroke())
    huge = whole[:16] + b"\xff\xff\xff\xff" + whole[20:]
    for data in (b"", b"not an image", whole[: len(whole) // 2], whole[:40], huge, b"GIF89a" + whole[6:]):
        with pytest.raises(
            InputError, match=r"row 7: got no readable image .*, expected PNG or JPEG"
        ) as caught:
            prepare_image(data, Preparation(), "row 7")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("factor", "levels"), [(257, None), (1, 255), (16, 4080), (16.0 / 4080, 1.0)])
def test_wide_values_give_the_same_image_as_8_bits(factor: float, levels: float | None):
    narrow = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = prepare_image(Image.fromarray(narrow), Preparation(size=16, ink="light"))
    kind = np.uint16 if isinstance(factor, int) else np.float32
    wide = Image.fromarray((narrow * np.float64(factor)).astype(kind))
    preparation = Preparation(size=16, ink="light", levels=levels)
    assert np.array_equal(prepare_image(wide, preparation), expected)
    if kind is np.uint16:
        assert np.array_equal(prepare_image(encode(wide), preparation), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            np.full((4, 4), 255, np.uint16),
            r"scan: got values up to 255 in an image of mode I;16, .* expected levels",
        ),
        (np.full((4, 4), 4095, np.uint16), r"scan: got values up to 4095 .* \(4095 for 12 bits"),
        (
            np.full((4, 4), 80.0, np.float32),
            r"scan: got values up to 80 in an image of mode F, whose range is 0 to 1",
        ),
        (np.full((4, 4), 70000, np.int32), r"scan: got values up to 70000"),
    ],
)
def test_wide_values_of_an_unknown_range_are_refused(image: np.ndarray, message: str):
    with pytest.raises(InputError, match=message):
        prepare_image(Image.fromarray(image), Preparation(), "scan")
    assert prepare_image(Image.fromarray(np.zeros_like(image)), Preparation(ink="light")).max() == 0


def encode_16_bit_colours(pixels: np.ndarray) -> bytes:
    """Write uint16 [H, W, 3] as a PNG file by hand: Pillow writes none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def test_16_bit_colours_are_read_or_refused_but_not_black():
    narrow = np.arange(256 * 3, dtype=np.uint16).reshape(16, 16, 3) % 256
    preparation = Preparation(size=16, ink="light", channels=3)
    expected = prepare_image(Image.fromarray(narrow.astype(np.uint8)), preparation)
    assert np.array_equal(prepare_image(encode_16_bit_colours(narrow * 257), preparation), expected)
    with pytest.raises(InputError, match=r"scan: got 16-bit colours up to about 3840, .* or 8-bit colours"):
        prepare_image(encode_16_bit_colours(narrow * 16), preparation, "scan")
    with pytest.raises(InputError, match=r"got 16-bit colours up to about 65280, .* \(and no levels\)"):
        prepare_image(encode_16_bit_colours(narrow * 257), Preparation(channels=3, levels=4095))
    assert prepare_image(encode_16_bit_colours(narrow * 0), preparation).max() == 0
