"""Writing drawings of classes as a task store: shared by all builders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distmeta.errors import InputError
from distmeta.tasks.image_preparation import Preparation, prepare_image
from distmeta.tasks.store import DomainColumns, write_store

ClassKey = tuple[str, str]
"""(group, class); the group is "" if there are no groups."""
Drawings = dict[ClassKey, dict[str, bytes]]
"""The files of each class: file name -> the file's bytes."""

NO_DOMAIN = ""
"""The only domain of a store without domains."""


class _Row(NamedTuple):
    """One image of the store."""

    key: ClassKey
    domain: str
    file: str

    @property
    def path(self) -> str:
        """DOMAIN/GROUP/CLASS/FILE, without what is empty."""
        return "/".join(filter(None, (self.domain, *self.key, self.file)))


def write_drawings(
    out: str, drawings_by_domain: Mapping[str, Drawings], preparation: Preparation
) -> dict[str, Any]:
    """Prepare the drawings and write a store of them.

    Args:
        out: the file to write.
        drawings_by_domain: one entry per domain, or only `NO_DOMAIN`.

    Returns:
        {"path", "classes", "examples"}.

    Raises:
        InputError: a file is not an image, or two files of a class and domain have the same name before the ending.
    """
    keys = sorted({key for drawings in drawings_by_domain.values() for key in drawings})
    rows = [
        _Row(key, domain, file)
        for key in keys
        for domain in sorted(drawings_by_domain)
        for file in sorted(drawings_by_domain[domain].get(key, ()))
    ]
    images = [
        prepare_image(drawings_by_domain[row.domain][row.key][row.file], preparation, row.path)
        for row in rows
    ]
    domains = None
    if NO_DOMAIN not in drawings_by_domain:
        domains = _number_drawings(rows, sorted(drawings_by_domain))
    write_store(
        out,
        images,
        classes=[name for _, name in keys],
        groups=[group for group, _ in keys],
        counts=[sum(len(drawings.get(key, ())) for drawings in drawings_by_domain.values()) for key in keys],
        preparation=preparation,
        domains=domains,
    )
    return {"path": str(out), "classes": len(keys), "examples": len(images)}


def _number_drawings(rows: list[_Row], names: list[str]) -> DomainColumns:
    """Return the domain of each row, and its drawing: the files of a class are numbered by name without the ending."""
    stems: dict[ClassKey, set[str]] = {}
    first_file: dict[tuple[ClassKey, str, str], str] = {}
    for row in rows:
        stem = Path(row.file).stem
        stems.setdefault(row.key, set()).add(stem)
        other = first_file.setdefault((row.key, row.domain, stem), row.file)
        if other != row.file:
            folder = "/".join(filter(None, (row.domain, *row.key)))
            raise InputError(
                f"--domains: got {other!r} and {row.file!r} in {folder}, expected names that differ before the ending"
            )
    numbers = {key: {stem: i for i, stem in enumerate(sorted(found))} for key, found in stems.items()}
    return DomainColumns(
        names,
        domain=np.array([names.index(row.domain) for row in rows], np.int32),
        drawing=np.array([numbers[row.key][Path(row.file).stem] for row in rows], np.int32),
    )
