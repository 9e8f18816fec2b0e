"""The task store of Omniglot, from its authors' archives (`distmeta data omniglot`).

Lake, Salakhutdinov & Tenenbaum 2015, "Human-level concept learning through probabilistic program induction". The
files are SET/ALPHABET/characterNN/IMAGE.png, with 20 drawings per character. There are two releases: "full"
(background and evaluation) and "small" (two sets of five alphabets each; Greek and Latin are in both).
"""

from __future__ import annotations

import http.client
import re
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distmeta.data.writer import NO_DOMAIN, Drawings, write_drawings
from distmeta.errors import InputError
from distmeta.tasks.image_preparation import Preparation

TIMEOUT = 60.0
"""Seconds without an answer from a server."""
LARGEST_IMAGE = 1 << 20
"""Bytes of the largest image in an archive that is read."""
DRAWINGS_PER_CHARACTER = 20
_CHUNK = 1 << 20
"""Bytes that are downloaded at once."""


class Release(NamedTuple):
    """Sets (each an archive with a folder of the same name in it), and what they hold together."""

    sets: tuple[str, ...]
    alphabets: int
    characters: int


SMALL = (Release(("images_background_small1", "images_background_small2"), 8, 242),)
"""The small sets overlap, so they are counted together."""
FULL = (Release(("images_background",), 30, 964), Release(("images_evaluation",), 20, 659))


class DrawingFile(NamedTuple):
    """One image of a set."""

    alphabet: str
    character: str
    name: str
    data: bytes


def build_omniglot(
    source: str, out: str, size: int = 28, which: Literal["auto", "small", "full"] = "auto"
) -> dict[str, Any]:
    """Build a store of Omniglot: classes are characters, groups are alphabets.

    Args:
        source: a folder with the authors' zip files or the unpacked sets, or the URL of such a folder.
        out: the file to write.
        size: height and width of an image in pixels.
        which: the release; "auto" takes the full one if both its archives are there, otherwise the small one.

    Returns:
        {"path", "classes", "examples"}.

    Raises:
        InputError: an archive is missing, damaged or incomplete. Then nothing is written.
    """
    if which not in ("auto", "small", "full"):
        raise InputError(f"--which: got {which!r}, expected auto, small or full")
    preparation = Preparation(size=size)
    if re.match(r"https?://", source):
        with tempfile.TemporaryDirectory(prefix="distmeta-") as folder:
            releases = _download_releases(source.rstrip("/"), which, Path(folder))
            drawings = _read_releases(Path(folder), releases, source)
    else:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise InputError(f"--source: got {source!r}, expected a folder or an http(s) URL")
        drawings = _read_releases(folder, _choose_releases(folder, which), source)
    return write_drawings(out, {NO_DOMAIN: drawings}, preparation)


def _choose_releases(folder: Path, which: str) -> tuple[Release, ...]:
    if which == "auto":
        complete = all(_has_set(folder, name) for release in FULL for name in release.sets)
        return FULL if complete else SMALL
    return FULL if which == "full" else SMALL


def _has_set(folder: Path, name: str) -> bool:
    return (folder / f"{name}.zip").is_file() or (folder / name).is_dir()


# --- Reading ------------------------------------------------------------------------------------------------------


def _read_releases(folder: Path, releases: tuple[Release, ...], source: str) -> Drawings:
    """Read all drawings of the releases and count them."""
    everything: Drawings = {}
    for release in releases:
        found: Drawings = {}
        for name in release.sets:
            for alphabet, character, file, data in _read_set(folder, name, source):
                known = found.setdefault((alphabet, character), {}).setdefault(file, data)
                if known != data:
                    path = f"{alphabet}/{character}/{file}"
                    raise InputError(f"--source: got two different {path}, expected one drawing")
        _check_counts(found, release)
        everything |= found
    return everything


def _check_counts(drawings: Drawings, release: Release) -> None:
    sets = " and ".join(release.sets)
    alphabets = len({alphabet for alphabet, _ in drawings})
    if (alphabets, len(drawings)) != (release.alphabets, release.characters):
        raise InputError(
            f"--source: got {alphabets} alphabets and {len(drawings)} characters in {sets}, expected "
            f"{release.alphabets} and {release.characters}: fetch the archives again"
        )
    for (alphabet, character), files in drawings.items():
        if len(files) != DRAWINGS_PER_CHARACTER:
            raise InputError(
                f"--source: got {len(files)} drawings of {alphabet}/{character} in {sets}, expected "
                f"{DRAWINGS_PER_CHARACTER}: fetch the archives again"
            )


def _read_set(folder: Path, name: str, source: str) -> Iterator[DrawingFile]:
    """Read the drawings of a set from its zip file or its unpacked folder."""
    archive = folder / f"{name}.zip"
    if archive.is_file():
        yield from _read_zip(archive, name)
    elif (folder / name).is_dir():
        for path in sorted((folder / name).glob("*/character*/*.png")):
            yield DrawingFile(path.parts[-3], path.parts[-2], path.name, path.read_bytes())
    else:
        raise InputError(f"--source: got {source!r} without {name}.zip, expected it or the folder {name}")


def _read_zip(archive: Path, name: str) -> Iterator[DrawingFile]:
    """Read the drawings of a zip file. They are read in memory, so no path in the archive is ever written to."""
    pattern = re.compile(rf"{re.escape(name)}/([^/]+)/(character\d+)/([^/]+\.png)")
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                match = pattern.fullmatch(member.filename)
                if match is None:
                    continue
                if member.file_size > LARGEST_IMAGE:
                    raise InputError(
                        f"--source: got {member.filename} of {member.file_size} bytes, "
                        f"expected at most {LARGEST_IMAGE}"
                    )
                yield DrawingFile(match[1], match[2], match[3], opened.read(member))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"--source: got a damaged {archive.name} ({error}), expected the authors' archive: fetch it again"
        ) from None


# --- Downloading --------------------------------------------------------------------------------------------------


def _download_releases(base: str, which: str, folder: Path) -> tuple[Release, ...]:
    """Download the archives to the folder; with "auto" the small release if the server does not have the full one."""
    if which != "small":
        optional = which == "auto"
        names = [name for release in FULL for name in release.sets]
        if all(_download_file(f"{base}/{name}.zip", folder, optional) for name in names):
            return FULL
    for name in SMALL[0].sets:
        _download_file(f"{base}/{name}.zip", folder)
    return SMALL


def _download_file(url: str, folder: Path, optional: bool = False) -> bool:
    """Download one file. Return False if it is optional and the server does not have it."""
    target = folder / url.rpartition("/")[2]
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, open(target, "wb") as file:
            size = 0
            while chunk := response.read(_CHUNK):
                size += file.write(chunk)
            expected = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        error.close()
        if optional and error.code == 404:
            return False
        raise InputError(f"--source: got HTTP {error.code} for {url}, expected the archive there") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise InputError(f"--source: got no answer from {url} ({error}), expected an archive") from None
    if expected is not None and size != int(expected):
        raise InputError(f"--source: got {size} bytes of {url}, expected {expected}: try again")
    return True
