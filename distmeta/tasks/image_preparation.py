"""Image preparation: from the bytes of a PNG or JPEG to uint8 [C, H, W], in one way everywhere.

MAML's Omniglot preparation is the default: 28×28 by Lanczos, inverted so that ink is 1, scaled by 1/255.
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

from distmeta.errors import InputError, did_you_mean

Filter = Literal["lanczos", "bilinear", "box", "nearest"]
Ink = Literal["dark", "light"]

_RESAMPLING = {
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True)
class Preparation:
    """How an image file becomes an example; kept in a store's schema and in checkpoints."""

    size: int = 28
    """Height and width; an image that is not square is stretched."""
    filter: Filter = "lanczos"
    ink: Ink = "dark"
    """Polarity of the source: dark ink on light paper is inverted, so that ink is 255."""
    channels: Literal[1, 3] = 1
    scale: float = 1 / 255
    """What a stored value is multiplied by to give a model's float32 input."""

    def __post_init__(self) -> None:
        for name, known in (("filter", get_args(Filter)), ("ink", get_args(Ink)), ("channels", (1, 3))):
            if getattr(self, name) not in known:
                wanted = " or ".join(map(str, known))
                raise InputError(f"preparation.{name}: got {getattr(self, name)!r}, expected {wanted}")
        if type(self.size) is not int or self.size < 1:
            raise InputError(f"preparation.size: got {self.size!r}, expected an integer of at least 1")
        if type(self.scale) not in (int, float) or not (0 < self.scale < math.inf):
            raise InputError(f"preparation.scale: got {self.scale!r}, expected a positive number")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a prepared image."""
        return (self.channels, self.size, self.size)

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Preparation:
        """The inverse of `to_dict`; fields that are left out take their defaults."""
        known = [field.name for field in dataclasses.fields(Preparation)]
        for name in fields:
            if name not in known:
                raise InputError(f"preparation.{name}: got an unknown key, {did_you_mean(name, known)}")
        return Preparation(**fields)


def prepare(source: bytes | Image.Image, preparation: Preparation, where: str = "image") -> np.ndarray:
    """The image as uint8 [C, H, W], ink at 255. `where` names it in errors.

    Greyscale (or RGB) first, then resized, then inverted where the ink is dark. One-bit images become
    0 and 255; transparent pixels show paper; 16-bit greyscale keeps its upper byte.
    """
    try:
        image = (
            Image.open(io.BytesIO(source), formats=("PNG", "JPEG")) if isinstance(source, bytes) else source
        )
        image.load()
        flat = _flat(image, preparation)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{where}: got no readable image ({reason}), expected PNG or JPEG") from None
    resampling = _RESAMPLING[preparation.filter]
    pixels = np.asarray(flat.resize((preparation.size, preparation.size), resampling))
    pixels_CHW = pixels[None] if preparation.channels == 1 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(255 - pixels_CHW if preparation.ink == "dark" else pixels_CHW)


def unit(pixels: np.ndarray, scale: float) -> np.ndarray:
    """Pixels as a model sees them: float32, multiplied by `scale`."""
    return np.multiply(pixels, np.float32(scale), dtype=np.float32)


def _flat(image: Image.Image, preparation: Preparation) -> Image.Image:
    """The image without transparency, in mode L or RGB."""
    mode = "L" if preparation.channels == 1 else "RGB"
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip at 255
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(wide, 0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        paper = (255, 255, 255, 255) if preparation.ink == "dark" else (0, 0, 0, 255)
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, paper), layer)
    return image.convert(mode)
