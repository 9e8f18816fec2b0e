"""A package has what a job needs, and nothing secret."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from distmeta.cluster import packaging as packing
from distmeta.cluster.packaging import pack
from distmeta.errors import InputError

SECRETS = (
    ".env", ".env.local", "prod.env", "server.pem", "deep/er/TLS.KEY", ".aws/credentials", ".ssh/config", ".netrc",
    "gcp-service-account-1.json", "my_credentials.json", "secrets.yaml", "id_rsa", "id_ed25519.old",
)  # fmt: skip


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"this is {name}")


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "more")


def contents(package: packing.Package) -> set[str]:
    with zipfile.ZipFile(package.path) as archive:
        assert archive.testzip() is None
        return set(archive.namelist())


@pytest.mark.parametrize("tracked", [False, True])
def test_secrets_stay(tmp_path: Path, tracked: bool) -> None:
    folder = tmp_path / "work"
    write(folder, "job.yaml", "mine.py", "package/__init__.py", "environment.yaml", *SECRETS)
    if tracked:
        git(folder, "init", "-q")
        git(folder, "add", "--force", ".")
    package = pack(folder, tmp_path / "package.zip", named=["job.yaml", ".env"])
    assert contents(package) == {"job.yaml", "mine.py", "package/__init__.py", "environment.yaml"}
    assert set(package.withheld) == set(SECRETS)


def test_what_git_ignores_stays_unless_the_job_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    write(folder, "job.yaml", "new.py", "data/store.arrow", "data/other.arrow", "runs/a/job.yaml", "gone.py")
    (folder / ".gitignore").write_text("data/\n")
    git(folder, "init", "-q")
    git(folder, "add", "job.yaml", "gone.py")
    (folder / "gone.py").unlink()
    package = pack(folder, tmp_path / "p.zip", named=["job.yaml", "./data/store.arrow"], without=["runs"])
    assert contents(package) == {".gitignore", "job.yaml", "new.py", "data/store.arrow"}


def test_submodules_go_along_each_by_its_own_rules(tmp_path: Path) -> None:
    for name in ("inner", "outer"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_text("x = 1\n")
        (folder / ".gitignore").write_text(f"ignored-by-{name}\n")
        git(folder, "init", "-q")
        git(folder, "add", ".")
        commit(folder)
    outer = tmp_path / "outer"
    git(
        outer,
        "-c",
        "protocol.file.allow=always",
        "submodule",
        "add",
        "-q",
        str(tmp_path / "inner"),
        "lib/inner",
    )
    (outer / "lib" / "inner" / "ignored-by-inner").touch()
    (outer / "lib" / "inner" / "new.py").touch()
    packed = pack(outer, tmp_path / "package.zip").files
    assert packed == (
        ".gitignore", ".gitmodules", "lib/inner/.gitignore", "lib/inner/inner.py", "lib/inner/new.py", "outer.py",
    )  # fmt: skip

    commit(outer)
    git(outer, "submodule", "deinit", "-q", "--force", "lib/inner")
    assert pack(outer, tmp_path / "package.zip").files == (".gitignore", ".gitmodules", "outer.py")


def test_without_git_noise_stays(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    write(
        folder, "job.yaml", "__pycache__/a.pyc", ".venv/lib/x.py", "mlruns/0/meta.yaml", "mlflow.db-journal"
    )
    write(folder, ".git/config", ".pytest_cache/x", "a/.ruff_cache/y", "a/b.py")
    assert contents(pack(folder, tmp_path / "p.zip")) == {"job.yaml", "a/b.py"}


def test_the_same_files_are_the_same_package(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, "job.yaml", "mine.py")
    (tmp_path / "one" / "mine.py").touch()
    packages = [pack(tmp_path / name, tmp_path / f"{name}.zip").path.read_bytes() for name in ("one", "two")]
    assert packages[0] == packages[1]


def test_too_large_a_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LIMIT", 5 << 20)
    folder = tmp_path / "work"
    write(folder, "job.yaml")
    (folder / "big.bin").write_bytes(bytes(6 << 20))
    with pytest.raises(
        InputError, match=r"--working-dir: got .* with 6 MiB .* at most 5 MiB; .*big.bin \(6 MiB\)"
    ):
        pack(folder, tmp_path / "p.zip")
    assert not (tmp_path / "p.zip").exists()


def test_no_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--working-dir: got .*nowhere.*, expected a folder"):
        pack(tmp_path / "nowhere", tmp_path / "p.zip")
