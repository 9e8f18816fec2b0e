"""Package a working folder for a cluster: what git does not ignore and what the job names, but no secrets."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from distmeta.errors import InputError

LIMIT = 256 << 20
"""Bytes of a package before compression. Every node unpacks it, and Ray's head keeps it in memory."""
SECRETS = (
    ".env", ".env.*", "*.env", ".envrc", ".netrc", ".pgpass", ".pypirc", ".npmrc", ".htpasswd", ".git-credentials",
    ".databrickscfg", ".ssh", ".aws", ".azure", ".gcloud", ".kube", ".docker", ".gnupg", ".mlflow",
    "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk", "id_rsa*", "id_dsa*", "id_ecdsa*",
    "id_ed25519*", "*credential*", "secret", "secrets", "secret.*", "secrets.*", "*service-account*.json",
    "*service_account*.json",
)  # fmt: skip
"""Names of files and folders that may contain secrets. They are left out even if git tracks them."""
NOISE = (
    ".git", ".hg", ".svn", "__pycache__", "*.pyc", ".venv", "venv", "node_modules", ".*_cache", ".ipynb_checkpoints",
    "mlruns", "mlartifacts", "mlflow.db*",
)  # fmt: skip
"""Names of files and folders that no job needs."""
LARGEST_SHOWN = 3
"""Files that the message about a large package lists."""


@dataclass(frozen=True)
class Package:
    """A zip file of a working folder."""

    path: Path
    files: tuple[str, ...]
    """Relative paths."""
    size: int
    """Bytes before compression."""
    withheld: tuple[str, ...]
    """Relative paths that were left out because of their names (`SECRETS`)."""


def build_package(
    folder: Path, target: Path, extra: Collection[str] = (), leave_out: Collection[str] = ()
) -> Package:
    """Write a zip file of a folder. The same files give the same bytes, so that Ray uploads them once.

    Args:
        folder: the working folder.
        target: the zip file to write.
        extra: relative paths to add even if git ignores them, unless their names are those of secrets.
        leave_out: relative folders to leave out, such as the folder of the runs.

    Raises:
        InputError: there is no such folder, a file cannot be read, or there are more than `LIMIT` bytes.
    """
    if not folder.is_dir():
        raise InputError(
            f"--working-dir: got {str(folder)!r}, expected a folder with the job and its modules"
        )
    found = {name for name in _list_files(folder) if not _is_inside(name, leave_out)}
    found |= {os.path.normpath(name) for name in extra}
    withheld = {name for name in found if _matches(name, SECRETS)}
    files = tuple(sorted(found - withheld))
    sizes = {name: (folder / name).stat().st_size for name in files}
    size = sum(sizes.values())
    if size > LIMIT:
        raise InputError(_describe_large(folder, sizes))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in files:
            _add_file(archive, folder / name, name)
    return Package(target, files, size, tuple(sorted(withheld)))


def _list_files(folder: Path) -> list[str]:
    """Return the folder's files: those that git tracks or does not ignore; without git, all of them."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        output = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # there is no git, or this is no repository
        output = b""
    names = os.fsdecode(output).split("\0")
    files = [name for name in names if name and (folder / name).is_file()]
    for name in names:
        is_repository = name.strip("./") and (folder / name).is_dir()
        if is_repository:  # git lists submodules and repositories inside this one as folders
            files += [str(Path(name, inner)) for inner in _list_files(folder / name)]
    return [name for name in files or _walk(folder) if not _matches(name, NOISE)]


def _walk(folder: Path) -> list[str]:
    """Return all files below a folder, except in folders that no job needs."""
    found: list[str] = []
    for top, folders, files in os.walk(folder):
        here = Path(top).relative_to(folder)
        # os.walk does not enter the others
        folders[:] = [name for name in folders if not _matches(name, NOISE)]
        found += [str(here / name) for name in files if (folder / here / name).is_file()]
    return found


def _is_inside(name: str, folders: Collection[str]) -> bool:
    return any(PurePath(name).is_relative_to(folder) for folder in folders)


def _matches(name: str, patterns: Collection[str]) -> bool:
    """Return whether any part of a path matches a pattern, in upper or lower case."""
    parts = [part.lower() for part in PurePath(name).parts]
    return any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in patterns)


def _add_file(archive: zipfile.ZipFile, source: Path, name: str) -> None:
    info = zipfile.ZipInfo(name)  # with a constant date, so that the same files give the same bytes
    info.compress_type = zipfile.ZIP_DEFLATED
    try:
        info.external_attr = (source.stat().st_mode & 0o777) << 16
        with source.open("rb") as file, archive.open(info, "w") as copy:
            shutil.copyfileobj(file, copy)
    except OSError as error:
        raise InputError(f"--working-dir: {source} cannot be packaged: {error}") from None


def _describe_large(folder: Path, sizes: Mapping[str, int]) -> str:
    largest = sorted(sizes, key=lambda name: -sizes[name])[:LARGEST_SHOWN]
    names = ", ".join(f"{name} ({sizes[name] >> 20} MiB)" for name in largest)
    return (
        f"--working-dir: got {folder} with {sum(sizes.values()) >> 20} MiB to package, expected at most "
        f"{LIMIT >> 20} MiB; the largest: {names}: let git ignore them, name data by a URI or an absolute path, "
        "or give a smaller folder"
    )
