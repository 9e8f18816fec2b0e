"""Task stores from any tree of image folders (`distmeta data images`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from distmeta.data.writer import NO_DOMAIN, Drawings, write_drawings
from distmeta.errors import InputError
from distmeta.tasks.image_preparation import Ink, Preparation

ENDINGS = (".png", ".jpg", ".jpeg")


def build_images(
    source: str,
    out: str,
    size: int = 28,
    ink: Ink = "dark",
    channels: Literal[1, 3] = 1,
    domains: bool = False,
    levels: float | None = None,
) -> dict[str, Any]:
    """Build a store from a tree CLASS/*.png or GROUP/CLASS/*.png (or jpg), everything in sorted order.

    Args:
        source: the folder of the tree. With `domains`: of one such tree per domain (photo, sketch, …). Classes are
            matched by their names. Files of a class with the same name before the ending show the same drawing in
            several domains.
        out: the file to write.
        size, ink, channels, levels: see `tasks.image_preparation.Preparation`.

    Returns:
        {"path", "classes", "examples"}.

    Raises:
        InputError: a folder or a file is not as expected.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        raise InputError(f"--source: got {source!r}, expected a folder of image folders")
    preparation = Preparation(size=size, ink=ink, channels=channels, levels=levels)
    if not domains:
        return write_drawings(out, {NO_DOMAIN: _read_tree(root)}, preparation)
    trees = {folder.name: _read_tree(folder) for folder in _list_folders(root)}
    _check_domains(trees, source)
    return write_drawings(out, trees, preparation)


def _check_domains(trees: dict[str, Drawings], source: str) -> None:
    """Check that there are several domains, and that all or none of them have groups."""
    if len(trees) < 2:
        raise InputError(
            f"--domains: got {len(trees)} folders in {source!r}, expected a folder for each of at least two domains"
        )
    grouped = [name for name, tree in trees.items() if any(group for group, _ in tree)]
    ungrouped = [name for name in trees if name not in grouped]
    if grouped and ungrouped:
        raise InputError(
            f"--domains: got GROUP/CLASS in {grouped[0]!r} and CLASS in {ungrouped[0]!r}, expected one of the two"
        )


def _read_tree(root: Path) -> Drawings:
    """Read the image files of CLASS/ or GROUP/CLASS/."""
    top = _list_folders(root)
    with_images = [folder for folder in top if _list_images(folder)]
    if with_images and len(with_images) < len(top):
        empty = next(folder for folder in top if folder not in with_images)
        raise InputError(f"--source: got {str(empty)!r} without images, expected some as in its siblings")
    if with_images:
        classes = [("", folder) for folder in top]
    else:
        classes = [(group.name, folder) for group in top for folder in _list_folders(group)]
    drawings: Drawings = {}
    for group, folder in classes:
        images = {path.name: path.read_bytes() for path in _list_images(folder)}
        if not images:
            raise InputError(f"--source: got {str(folder)!r} without PNG or JPEG files, expected some")
        drawings[group, folder.name] = images
    if not drawings:
        raise InputError(
            f"--source: got {str(root)!r} without images, expected CLASS/*.png or GROUP/CLASS/*.png"
        )
    return drawings


def _list_folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir() and not _is_hidden(path))


def _list_images(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and not _is_hidden(path)
    )


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")
