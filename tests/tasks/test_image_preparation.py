"""Image preparation against Pillow, polarity, modes and damaged bytes."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from distmeta.errors import InputError
from distmeta.tasks.image_preparation import Preparation, prepare, unit


def png(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def stroke(size=105):
    pixels = np.full((size, size), 255, np.uint8)
    pixels[20:80, 50:54] = 0
    return Image.fromarray(pixels)


def test_maml_preparation():
    one_bit = stroke().convert("1")
    prepared = prepare(png(one_bit), Preparation())
    by_hand = 1 - np.asarray(one_bit.convert("L").resize((28, 28), Image.Resampling.LANCZOS)) / 255
    assert prepared.dtype == np.uint8
    assert prepared.shape == (1, 28, 28)
    np.testing.assert_allclose(unit(prepared, Preparation().scale)[0], by_hand, atol=1e-6)
    assert prepared.max() >= 200
    assert prepared[0, 0, 0] == 0


def test_unit_reaches_one_exactly():
    scaled = unit(np.array([0, 255], np.uint8), 1 / 255)
    assert scaled.tolist() == [0.0, 1.0]
    assert scaled.dtype == np.float32


def test_polarity_and_filters():
    light = prepare(stroke(), Preparation(ink="light"))
    assert np.array_equal(255 - light, prepare(stroke(), Preparation(ink="dark")))
    results = {
        name: prepare(stroke(), Preparation(filter=name)).tobytes() for name in ("box", "nearest", "bilinear")
    }
    assert len(set(results.values())) == 3


def test_modes():
    colour = Image.new("RGB", (10, 6), (255, 0, 0))
    prepared = prepare(png(colour), Preparation(size=4, ink="light", channels=3))
    assert prepared.shape == (3, 4, 4)
    assert prepared[:, 0, 0].tolist() == [255, 0, 0]
    clear = Image.new("RGBA", (5, 5), (0, 0, 0, 0))
    assert prepare(png(clear), Preparation(size=5)).max() == 0  # transparent is paper, of either polarity
    assert prepare(png(clear), Preparation(size=5, ink="light")).max() == 0
    wide = Image.fromarray(np.full((5, 5), 0x8000, np.uint16))
    assert prepare(png(wide), Preparation(size=5, ink="light")).max() == 0x80
    assert prepare(png(colour, "JPEG"), Preparation()).shape == (1, 28, 28)


def test_round_trip_through_json():
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
def test_bad_preparations(fields, message):
    with pytest.raises(InputError, match=message):
        Preparation.from_dict(fields)


def test_bad_bytes():
    good = png(stroke())
    header = good[:16] + b"\xff\xff\xff\xff" + good[20:]
    for data in (b"", b"not an image", good[: len(good) // 2], good[:40], header, b"GIF89a" + good[6:]):
        with pytest.raises(
            InputError, match=r"row 7: got no readable image .*, expected PNG or JPEG"
        ) as caught:
            prepare(data, Preparation(), "row 7")
        assert "\n" not in str(caught.value)
