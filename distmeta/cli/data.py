"""`distmeta data`: build a task store."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from distmeta.cli.options import Json
from distmeta.cli.output import print_json

app = typer.Typer(help="Build task stores.", no_args_is_help=True)

Out = Annotated[str, typer.Option(help="Task store to write.")]
Size = Annotated[int, typer.Option(help="Height and width of an image, in pixels.")]


@app.command()
def omniglot(
    source: Annotated[str, typer.Option(help="Folder or URL with the authors' zip files.")],
    out: Out,
    size: Size = 28,
    which: Annotated[str, typer.Option(help="auto, small or full: which of the authors' sets.")] = "auto",
    as_json: Json = False,
) -> None:
    """Build a store from Omniglot's zip files (Lake et al. 2015)."""
    from distmeta.data.omniglot import build_omniglot

    # build_omniglot checks `which`; typer has no type for it that keeps our message
    built = build_omniglot(source, out, size=size, which=which)  # pyright: ignore[reportArgumentType]
    _print_store(built, as_json)


@app.command()
def images(
    source: Annotated[str, typer.Option(help="Folder with one folder per class, or group/class.")],
    out: Out,
    size: Size = 28,
    ink: Annotated[
        str, typer.Option(help="dark: dark on light, will be inverted; light: kept as it is.")
    ] = "light",
    channels: Annotated[int, typer.Option(help="1 (grey) or 3 (colour).")] = 3,
    domains: Annotated[bool, typer.Option("--domains", help="The first folder level is a domain.")] = False,
    levels: Annotated[
        float | None, typer.Option(help="Value of a 16-bit image that means white; default: 65535.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build a store from a tree of image files."""
    from distmeta.data.images import build_images

    # build_images checks `ink`; typer has no type for it that keeps our message
    built = build_images(
        source,
        out,
        size=size,
        ink=ink,  # pyright: ignore[reportArgumentType]
        channels=channels,  # pyright: ignore[reportArgumentType]
        domains=domains,
        levels=levels,
    )
    _print_store(built, as_json)


def _print_store(built: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(built)
    else:
        print(f"{built['path']}: {built['classes']} classes, {built['examples']} examples")
