"""Building task stores: Omniglot from its authors' archives, and any tree of image folders.

Omniglot: Lake, Salakhutdinov & Tenenbaum 2015, "Human-level concept learning through probabilistic program
induction"; SET/ALPHABET/characterNN/IMAGE.png, 20 drawings a character. Two releases: "full" (background and
evaluation) and "small" (two sets of five alphabets, of which Greek and Latin are in both).
"""

from __future__ import annotations

import http.client
import re
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from distmeta.errors import InputError
from distmeta.tasks.image_preparation import Ink, Preparation, prepare
from distmeta.tasks.store import Domains, write_store

Drawings = dict[tuple[str, str], dict[str, bytes]]
"""(group, class) -> file name -> the file's bytes."""

_TIMEOUT = 60.0
_LARGEST_PNG = 1 << 20
_DRAWINGS = 20


class _Release(NamedTuple):
    """Archives (each with a folder of its name in it), and what all of them hold together."""

    sets: tuple[str, ...]
    alphabets: int
    characters: int


# As one table for each archive that has a count of its own; the small two overlap and are counted together.
_SMALL = (_Release(("images_background_small1", "images_background_small2"), 8, 242),)
_FULL = (_Release(("images_background",), 30, 964), _Release(("images_evaluation",), 20, 659))


def build_omniglot(
    source: str, out: str, size: int = 28, which: Literal["auto", "small", "full"] = "auto"
) -> dict[str, Any]:
    """Builds a store of Omniglot: classes are characters, groups are alphabets.

    source: a folder with the authors' zip files or the unpacked trees, or the URL of such a folder.
    which: "auto" takes the full release where both its archives are there, else the small one.
    Returns {"path", "classes", "examples"}. Raises InputError where an archive is missing, damaged or
    incomplete; then nothing is written.
    """
    if which not in ("auto", "small", "full"):
        raise InputError(f"--which: got {which!r}, expected auto, small or full")
    preparation = Preparation(size=size)
    if re.match(r"https?://", source):
        with tempfile.TemporaryDirectory(prefix="distmeta-") as folder:
            releases = _download(source.rstrip("/"), which, Path(folder))
            drawings = _read_releases(Path(folder), releases, source)
    else:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise InputError(f"--source: got {source!r}, expected a folder or an http(s) URL")
        full = all(_present(folder, name) for release in _FULL for name in release.sets)
        releases = _FULL if which == "full" or (which == "auto" and full) else _SMALL
        drawings = _read_releases(folder, releases, source)
    return _write(out, {"": drawings}, preparation)


def build_images(
    source: str,
    out: str,
    size: int = 28,
    ink: Ink = "dark",
    channels: Literal[1, 3] = 1,
    domains: bool = False,
) -> dict[str, Any]:
    """Builds a store of a tree CLASS/*.png or GROUP/CLASS/*.png (or jpg), all in sorted order.

    domains: there is a folder of such a tree for each domain (photo, sketch, …). Classes are matched by their names;
    files of a class with the same name, but for the ending, show the same drawing in several domains.
    Returns {"path", "classes", "examples"}; raises InputError where a folder or a file is not as expected.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        raise InputError(f"--source: got {source!r}, expected a folder of image folders")
    preparation = Preparation(size=size, ink=ink, channels=channels)
    if not domains:
        return _write(out, {"": _read_tree(root)}, preparation)
    trees = {folder.name: _read_tree(folder) for folder in _folders(root)}
    if len(trees) < 2:
        raise InputError(
            f"--domains: got {len(trees)} folders in {source!r}, expected a folder for each of at least two domains"
        )
    grouped = {name: any(group for group, _ in tree) for name, tree in trees.items()}
    if len(set(grouped.values())) > 1:
        one, other = (next(name for name, has in grouped.items() if has == value) for value in (True, False))
        raise InputError(
            f"--domains: got GROUP/CLASS in {one!r} and CLASS in {other!r}, expected one of the two"
        )
    return _write(out, trees, preparation)


def _read_tree(root: Path) -> Drawings:
    """The image files of CLASS/ or GROUP/CLASS/."""
    top = _folders(root)
    flat = [folder for folder in top if _pictures(folder)]
    if flat and len(flat) < len(top):
        other = next(folder for folder in top if folder not in flat)
        raise InputError(f"--source: got {str(other)!r} without images, expected some as in its siblings")
    classes = [("", folder) for folder in top] if flat else [(g.name, c) for g in top for c in _folders(g)]
    drawings: Drawings = {}
    for group, folder in classes:
        drawings[group, folder.name] = {path.name: path.read_bytes() for path in _pictures(folder)}
        if not drawings[group, folder.name]:
            raise InputError(f"--source: got {str(folder)!r} without PNG or JPEG files, expected some")
    if not drawings:
        raise InputError(
            f"--source: got {str(root)!r} without images, expected CLASS/*.png or GROUP/CLASS/*.png"
        )
    return drawings


def _write(out: str, trees: Mapping[str, Drawings], preparation: Preparation) -> dict[str, Any]:
    """Prepares the drawings and writes the store. trees: one a domain, or one named ""."""
    keys = sorted({key for tree in trees.values() for key in tree})
    rows = [
        (key, domain, file)
        for key in keys
        for domain in sorted(trees)
        for file in sorted(trees[domain].get(key, ()))
    ]
    images = np.stack(
        [
            prepare(trees[domain][key][file], preparation, "/".join(filter(None, (domain, *key, file))))
            for key, domain, file in rows
        ]
    )
    counts = [sum(len(tree.get(key, ())) for tree in trees.values()) for key in keys]
    groups, classes = [group for group, _ in keys], [name for _, name in keys]
    domains = None if "" in trees else _domains(rows, sorted(trees))
    write_store(out, images, classes, groups, counts, preparation, domains)
    return {"path": str(out), "classes": len(keys), "examples": len(images)}


def _domains(rows: list[tuple[tuple[str, str], str, str]], names: list[str]) -> Domains:
    """The domain of each (class, domain, file), and its drawing: the file's name without its ending."""
    stems: dict[tuple[str, str], set[str]] = {}
    seen: dict[tuple[tuple[str, str], str, str], str] = {}
    for key, domain, file in rows:
        stems.setdefault(key, set()).add(Path(file).stem)
        other = seen.setdefault((key, domain, Path(file).stem), file)
        if other != file:
            where = "/".join(filter(None, (domain, *key)))
            raise InputError(
                f"--domains: got {other!r} and {file!r} in {where}, expected names that differ before the ending"
            )
    number = {key: {stem: i for i, stem in enumerate(sorted(found))} for key, found in stems.items()}
    return Domains(
        names,
        np.array([names.index(domain) for _, domain, _ in rows], np.int32),
        np.array([number[key][Path(file).stem] for key, _, file in rows], np.int32),
    )


def _read_releases(folder: Path, releases: tuple[_Release, ...], source: str) -> Drawings:
    """All drawings of the releases, each counted."""
    everything: Drawings = {}
    for release in releases:
        found: Drawings = {}
        for name in release.sets:
            for alphabet, character, file, data in _read_set(folder, name, source):
                known = found.setdefault((alphabet, character), {}).setdefault(file, data)
                if known != data:
                    where = f"{alphabet}/{character}/{file}"
                    raise InputError(f"--source: got two different {where}, expected one drawing")
        _check_counts(found, release)
        everything |= found
    return everything


def _check_counts(found: Drawings, release: _Release) -> None:
    what = " and ".join(release.sets)
    alphabets = len({alphabet for alphabet, _ in found})
    if (alphabets, len(found)) != (release.alphabets, release.characters):
        raise InputError(
            f"--source: got {alphabets} alphabets and {len(found)} characters in {what}, expected "
            f"{release.alphabets} and {release.characters}: fetch the archives again"
        )
    for (alphabet, character), files in found.items():
        if len(files) != _DRAWINGS:
            raise InputError(
                f"--source: got {len(files)} drawings of {alphabet}/{character} in {what}, expected "
                f"{_DRAWINGS}: fetch the archives again"
            )


def _present(folder: Path, name: str) -> bool:
    return (folder / f"{name}.zip").is_file() or (folder / name).is_dir()


def _read_set(folder: Path, name: str, source: str) -> Iterator[tuple[str, str, str, bytes]]:
    """(alphabet, character, file name, bytes) of each drawing of a set, from its zip or its unpacked tree."""
    archive = folder / f"{name}.zip"
    if archive.is_file():
        yield from _read_zip(archive, name)
    elif (folder / name).is_dir():
        for path in sorted((folder / name).glob("*/character*/*.png")):
            yield path.parts[-3], path.parts[-2], path.name, path.read_bytes()
    else:
        raise InputError(f"--source: got {source!r} without {name}.zip, expected it or the folder {name}")


def _read_zip(archive: Path, name: str) -> Iterator[tuple[str, str, str, bytes]]:
    """As `_read_set`. Members are read in memory: an archive cannot say where anything is written."""
    pattern = re.compile(rf"{re.escape(name)}/([^/]+)/(character\d+)/([^/]+\.png)")
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                match = pattern.fullmatch(member.filename)
                if match is None:
                    continue
                if member.file_size > _LARGEST_PNG:
                    raise InputError(
                        f"--source: got {member.filename} of {member.file_size} bytes, expected less"
                    )
                yield match[1], match[2], match[3], opened.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"--source: got a damaged {archive.name} ({error}), expected the authors' archive: fetch it again"
        ) from None


def _download(base: str, which: str, folder: Path) -> tuple[_Release, ...]:
    """Fetches the archives into the folder; with "auto", the small release where the full is not there."""
    if which != "small":
        names = [name for release in _FULL for name in release.sets]
        if all(_fetch(f"{base}/{name}.zip", folder, optional=which == "auto") for name in names):
            return _FULL
    for name in _SMALL[0].sets:
        _fetch(f"{base}/{name}.zip", folder)
    return _SMALL


def _fetch(url: str, folder: Path, optional: bool = False) -> bool:
    """Fetches one file; False where it is optional and the server has none."""
    target = folder / url.rpartition("/")[2]
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, open(target, "wb") as file:
            size = 0
            while chunk := response.read(1 << 20):
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


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    endings = {".png", ".jpg", ".jpeg"}
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in endings and not p.name.startswith("."))
