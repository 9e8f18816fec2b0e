"""What of a working folder goes to a cluster: what git does not ignore, what the job names, nothing secret."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePath

from distmeta.errors import InputError

LIMIT = 256 << 20
"""Bytes of a package before compression. Every node unpacks one, and Ray's head keeps it in memory."""
SECRET = (
    ".env", ".env.*", "*.env", ".envrc", ".netrc", ".pgpass", ".pypirc", ".npmrc", ".htpasswd", ".git-credentials",
    ".databrickscfg", ".ssh", ".aws", ".azure", ".gcloud", ".kube", ".docker", ".gnupg", ".mlflow",
    "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk", "id_rsa*", "id_dsa*", "id_ecdsa*",
    "id_ed25519*", "*credential*", "secret", "secrets", "secret.*", "secrets.*", "*service-account*.json",
    "*service_account*.json",
)  # fmt: skip
"""Names of files and folders that may hold a secret; git may track them, a package does not."""
NOISE = (
    ".git", ".hg", ".svn", "__pycache__", "*.pyc", ".venv", "venv", "node_modules", ".*_cache", ".ipynb_checkpoints",
    "mlruns", "mlartifacts", "mlflow.db*",
)  # fmt: skip
"""What a job does not need, where no git says so."""


@dataclass(frozen=True)
class Package:
    """A zip file of a working folder."""

    path: Path
    files: tuple[str, ...]
    size: int
    """Bytes before compression."""
    withheld: tuple[str, ...]
    """Left out because their names are those of secrets."""


def pack(folder: Path, target: Path, named: Collection[str] = (), without: Collection[str] = ()) -> Package:
    """Writes `target`, a zip file with the same bytes for the same files.

    Args:
        named: relative paths that go along although git ignores them; a secret's name still keeps them out.
        without: relative folders that stay here, such as the runs'.

    Raises:
        InputError: no such folder, a file that cannot be read, more than `LIMIT` bytes.
    """
    if not folder.is_dir():
        raise InputError(
            f"--working-dir: got {str(folder)!r}, expected a folder with the job and its modules"
        )
    stays = [PurePath(name) for name in without]
    found = {name for name in _listed(folder) if not any(PurePath(name).is_relative_to(top) for top in stays)}
    found |= {os.path.normpath(name) for name in named}
    withheld = tuple(sorted(name for name in found if _matches(name, SECRET)))
    files = tuple(sorted(found.difference(withheld)))
    sizes = {name: (folder / name).stat().st_size for name in files}
    if sum(sizes.values()) > LIMIT:
        raise InputError(_too_large(folder, sizes))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in files:
            _add(archive, folder / name, name)
    return Package(target, files, sum(sizes.values()), withheld)


def _listed(folder: Path) -> list[str]:
    """The folder's files, by git where it is git's, else by walking it."""
    words = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = os.fsdecode(subprocess.run(words, capture_output=True, check=True).stdout).split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = []  # no git, or no repository
    listed = [name for name in names if name and (folder / name).is_file()]
    for name in names:  # submodules, and repositories of others: each by its own
        if name.strip("./") and (folder / name).is_dir():
            listed += [str(Path(name, inner)) for inner in _listed(folder / name)]
    return [name for name in listed or _walked(folder) if not _matches(name, NOISE)]


def _walked(folder: Path) -> list[str]:
    names: list[str] = []
    for top, folders, files in os.walk(folder):
        here = Path(top).relative_to(folder)
        folders[:] = [name for name in folders if not _matches(name, NOISE)]
        names += [str(here / name) for name in files if (folder / here / name).is_file()]
    return names


def _matches(name: str, patterns: Collection[str]) -> bool:
    parts = [part.lower() for part in PurePath(name).parts]
    return any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in patterns)


def _add(archive: zipfile.ZipFile, source: Path, name: str) -> None:
    info = zipfile.ZipInfo(name)  # its date is 1980's: the same files give the same package, uploaded once
    info.compress_type = zipfile.ZIP_DEFLATED
    try:
        info.external_attr = (source.stat().st_mode & 0o777) << 16
        with source.open("rb") as file, archive.open(info, "w") as copy:
            shutil.copyfileobj(file, copy)
    except OSError as error:
        raise InputError(f"--working-dir: {source} cannot be packaged: {error}") from None


def _too_large(folder: Path, sizes: dict[str, int]) -> str:
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    names = ", ".join(f"{name} ({sizes[name] >> 20} MiB)" for name in largest)
    return (
        f"--working-dir: got {folder} with {sum(sizes.values()) >> 20} MiB to package, expected at most "
        f"{LIMIT >> 20} MiB; the largest: {names}: have git ignore them, name data by a URI or an absolute path, "
        "or give a smaller folder"
    )
