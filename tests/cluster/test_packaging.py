"""A package contains what a job needs, and no secrets."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from distmeta.cluster import packaging
from distmeta.cluster.packaging import Package, build_package
from distmeta.errors import InputError

SECRETS = (
    ".env", ".env.local", "prod.env", "server.pem", "deep/er/TLS.KEY", ".aws/credentials", ".ssh/config", ".netrc",
    "gcp-service-account-1.json", "my_credentials.json", "secrets.yaml", "id_rsa", "id_ed25519.old",
)  # fmt: skip


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"this is {name}")


def run_git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


def commit(folder: Path) -> None:
    run_git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "more")


def read_names(package: Package) -> set[str]:
    with zipfile.ZipFile(package.path) as archive:
        assert archive.testzip() is None
        return set(archive.namelist())


@pytest.mark.parametrize("tracked", [False, True])
def test_secrets_are_withheld_even_if_git_tracks_them(tmp_path: Path, tracked: bool) -> None:
    folder = tmp_path / "work"
    write_files(folder, "job.yaml", "mine.py", "package/__init__.py", "environment.yaml", *SECRETS)
    if tracked:
        run_git(folder, "init", "-q")
        run_git(folder, "add", "--force", ".")
    package = build_package(folder, tmp_path / "package.zip", extra=["job.yaml", ".env"])
    assert read_names(package) == {"job.yaml", "mine.py", "package/__init__.py", "environment.yaml"}
    assert set(package.withheld) == set(SECRETS)


def test_ignored_files_are_left_out_unless_the_job_names_them(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    write_files(folder, "job.yaml", "new.py", "data/store.arrow", "data/other.arrow", "runs/a/job.yaml")
    write_files(folder, "deleted.py")
    (folder / ".gitignore").write_text("data/\n")
    run_git(folder, "init", "-q")
    run_git(folder, "add", "job.yaml", "deleted.py")
    (folder / "deleted.py").unlink()
    extra = ["job.yaml", "./data/store.arrow"]
    package = build_package(folder, tmp_path / "p.zip", extra=extra, leave_out=["runs"])
    assert read_names(package) == {".gitignore", "job.yaml", "new.py", "data/store.arrow"}


def test_each_submodule_follows_its_own_gitignore(tmp_path: Path) -> None:
    for name in ("inner", "outer"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_text("x = 1\n")
        (folder / ".gitignore").write_text(f"ignored-by-{name}\n")
        run_git(folder, "init", "-q")
        run_git(folder, "add", ".")
        commit(folder)
    outer = tmp_path / "outer"
    add = ["submodule", "add", "-q", str(tmp_path / "inner"), "lib/inner"]
    run_git(outer, "-c", "protocol.file.allow=always", *add)
    (outer / "lib" / "inner" / "ignored-by-inner").touch()
    (outer / "lib" / "inner" / "new.py").touch()
    files = build_package(outer, tmp_path / "package.zip").files
    assert files == (
        ".gitignore", ".gitmodules", "lib/inner/.gitignore", "lib/inner/inner.py", "lib/inner/new.py", "outer.py",
    )  # fmt: skip

    commit(outer)
    run_git(outer, "submodule", "deinit", "-q", "--force", "lib/inner")
    files = build_package(outer, tmp_path / "package.zip").files
    assert files == (".gitignore", ".gitmodules", "outer.py")


def test_without_git_caches_and_environments_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    write_files(folder, "job.yaml", "a/b.py", ".git/config", "__pycache__/a.pyc", ".venv/lib/x.py")
    write_files(folder, "mlruns/0/meta.yaml", "mlflow.db-journal", ".pytest_cache/x", "a/.ruff_cache/y")
    package = build_package(folder, tmp_path / "p.zip")
    assert read_names(package) == {"job.yaml", "a/b.py"}


def test_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        write_files(tmp_path / name, "job.yaml", "mine.py")
        (tmp_path / name / "mine.py").touch()
        package = build_package(tmp_path / name, tmp_path / f"{name}.zip")
        contents.append(package.path.read_bytes())
    assert contents[0] == contents[1]


def test_large_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaging, "LIMIT", 5 << 20)
    folder = tmp_path / "work"
    write_files(folder, "job.yaml")
    (folder / "big.bin").write_bytes(bytes(6 << 20))
    expected = r"--working-dir: got .* with 6 MiB .* at most 5 MiB; .*big.bin \(6 MiB\)"
    with pytest.raises(InputError, match=expected):
        build_package(folder, tmp_path / "p.zip")
    assert not (tmp_path / "p.zip").exists()


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--working-dir: got .*nowhere.*, expected a folder"):
        build_package(tmp_path / "nowhere", tmp_path / "p.zip")
