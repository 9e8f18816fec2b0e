"""Image preparation: from the bytes of a PNG or JPEG file to uint8 [C, H, W], the same way everywhere.

The default is MAML's preparation of Omniglot: 28×28 by Lanczos, inverted so that ink is 1, scaled by 1/255.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from distmeta.errors import InputError, did_you_mean, first_line

Filter = Literal["lanczos", "bilinear", "box", "nearest"]
Ink = Literal["dark", "light"]

LEAST_SHARE = 1 / 16
"""An image of more than 8 bits that uses less of its range than this is probably scaled differently."""

_RESAMPLING = {
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True)
class Preparation:
    """How an image file becomes an example. Stored in a task store's schema and in checkpoints."""

    size: int = 28
    """Height and width in pixels. An image that is not square is stretched."""
    filter: Filter = "lanczos"
    ink: Ink = "dark"
    """Polarity of the source. Dark ink on light paper is inverted, so that ink is 255."""
    channels: Literal[1, 3] = 1
    levels: float | None = None
    """The value of a 16-bit, 32-bit or float source that means white; null: the type's range (65,535; 1 for floats)."""
    scale: float = 1 / 255
    """A stored value is multiplied by this to give the float32 input of a model."""

    def __post_init__(self) -> None:
        known_values = {"filter": get_args(Filter), "ink": get_args(Ink), "channels": (1, 3)}
        for name, known in known_values.items():
            value = vars(self)[name]
            if value not in known:
                expected = " or ".join(map(str, known))
                raise InputError(f"preparation.{name}: got {value!r}, expected {expected}")
        if type(self.size) is not int or self.size < 1:
            raise InputError(f"preparation.size: got {self.size!r}, expected an integer of at least 1")
        if type(self.scale) not in (int, float) or not (0 < self.scale < math.inf):
            raise InputError(f"preparation.scale: got {self.scale!r}, expected a positive number")
        if self.levels is not None and not (type(self.levels) in (int, float) and 0 < self.levels < math.inf):
            raise InputError(f"preparation.levels: got {self.levels!r}, expected a positive number or null")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a prepared image."""
        return (self.channels, self.size, self.size)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Preparation:
        """Do the inverse of `to_dict`. Missing fields take their defaults."""
        known = [field.name for field in dataclasses.fields(Preparation)]
        for name in fields:
            if name not in known:
                raise InputError(f"preparation.{name}: got an unknown key, {did_you_mean(name, known)}")
        return Preparation(**fields)


def prepare_image(source: bytes | Image.Image, preparation: Preparation, where: str = "image") -> np.ndarray:
    """Return the image as uint8 [C, H, W], with ink at 255.

    Converts to greyscale (or RGB), resizes, then inverts if the ink is dark. One-bit images become 0 and 255;
    transparent pixels show paper; values of more than 8 bits are scaled by `Preparation.levels`.

    Args:
        where: names the image in errors.

    Raises:
        InputError: the bytes are not a complete PNG or JPEG image, or its values do not fit the range that they are
            scaled by, so that it would be nearly black or cut off.
    """
    try:
        image = source
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image), formats=("PNG", "JPEG"))
        image.load()
        if isinstance(source, bytes) and _has_16_bit_colours(source):
            _check_colours(np.asarray(image), preparation.levels)
        flat = _flatten(image, preparation)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{where}: got no readable image ({first_line(error)}), expected PNG or JPEG"
        ) from None
    resampling = _RESAMPLING[preparation.filter]
    pixels = np.asarray(flat.resize((preparation.size, preparation.size), resampling))
    pixels_CHW = pixels[None] if preparation.channels == 1 else pixels.transpose(2, 0, 1)
    if preparation.ink == "dark":
        pixels_CHW = 255 - pixels_CHW
    return np.ascontiguousarray(pixels_CHW)


def scale_pixels(pixels: np.ndarray, scale: float) -> np.ndarray:
    """Return pixels as a model sees them: float32, multiplied by `scale`."""
    return np.multiply(pixels, np.float32(scale), dtype=np.float32)


def _has_16_bit_colours(source: bytes) -> bool:
    """Return whether the bytes are a PNG file with several channels of 16 bits (its header: bit depth, colour type)."""
    return source.startswith(b"\x89PNG") and source[24] == 16 and source[25] != 0


def _check_colours(pixels: np.ndarray, levels: float | None) -> None:
    """Refuse colours of 16 bits that are scaled differently: Pillow (13.0) keeps only the upper 8 bits of each.

    Raises:
        InputError: levels are given, or the values use less than a sixteenth of the range.
    """
    largest = (
        int(pixels[..., :3].max(initial=0)) if pixels.shape[-1] != 2 else int(pixels[..., 0].max(initial=0))
    )
    if levels is not None or 0 < largest < 256 * LEAST_SHARE:
        raise InputError(
            f"got 16-bit colours up to about {256 * largest}, of which only the upper 8 bits are read, expected values "
            "that use the range 0 to 65535 (and no levels), or 8-bit colours"
        )


def _scale_to_8_bits(values: np.ndarray, mode: str, levels: float | None) -> np.ndarray:
    """Return values of more than 8 bits as uint8, with `levels` at 255.

    Raises:
        InputError: no range is given, and the values use less than a sixteenth of the type's range or exceed it.
    """
    full = 1.0 if mode == "F" else 65535.0
    largest = float(values.max(initial=0.0))
    if levels is None and largest > 0 and not full * LEAST_SHARE <= largest <= full:
        raise InputError(
            f"got values up to {largest:g} in an image of mode {mode}, whose range is 0 to {full:g}, expected "
            "levels: the value that means white (4095 for 12 bits; the range itself if the image is so dark)"
        )
    return np.rint(np.clip(values / (levels or full), 0, 1) * 255).astype(np.uint8)


def _flatten(image: Image.Image, preparation: Preparation) -> Image.Image:
    """Return the image without transparency, in mode L or RGB."""
    mode = "L" if preparation.channels == 1 else "RGB"
    if image.mode.startswith(("I", "F")):  # Pillow would clip these at 255
        image = Image.fromarray(
            _scale_to_8_bits(np.asarray(image, np.float64), image.mode, preparation.levels)
        )
    if image.has_transparency_data:
        paper = (255, 255, 255, 255) if preparation.ink == "dark" else (0, 0, 0, 255)
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, paper), layer)
    return image.convert(mode)
