"""Stores of image folders: classes, groups, domains, and wrong trees."""

import io
import sys

import pytest
from PIL import Image

from distmeta.cli import main as cli
from distmeta.data.images import build_images
from distmeta.errors import InputError
from distmeta.tasks.store import TaskStore


def make_image(value, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("L", (9, 9), value).save(buffer, kind)
    return buffer.getvalue()


def test_tree_becomes_a_store_in_sorted_order(tmp_path):
    tree = tmp_path / "tree"
    files = {"zebra/2.png": "PNG", "zebra/10.PNG": "PNG", "ant/1.jpg": "JPEG", "ant/b.jpeg": "JPEG"}
    for name, kind in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(make_image(200 if "2" in name else 50, kind))
    (tree / "ant" / "notes.txt").write_text("ignored")
    (tree / ".hidden").mkdir()
    built = build_images(str(tree), str(tmp_path / "x"), size=4, ink="light", channels=3)
    assert built == {"path": str(tmp_path / "x"), "classes": 2, "examples": 4}
    store = TaskStore.open(built["path"])
    assert (store.classes, store.groups, store.counts) == (["ant", "zebra"], ["", ""], [2, 2])
    assert store.images[:, 0, 0, 0].tolist() == [50, 50, 50, 200]
    (tmp_path / "grouped").mkdir()
    tree.rename(tmp_path / "grouped" / "animals")
    build_images(str(tmp_path / "grouped"), str(tmp_path / "y"), size=4, ink="light", channels=3)
    assert TaskStore.open(str(tmp_path / "y")).groups == ["animals", "animals"]


def test_wrong_tree_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--source: got .*expected a folder"):
        build_images(str(tmp_path / "absent"), str(tmp_path / "x"))
    tree = tmp_path / "tree"
    (tree / "a").mkdir(parents=True)
    with pytest.raises(InputError, match="without images"):
        build_images(str(tree), str(tmp_path / "x"))
    (tree / "a" / "1.png").write_bytes(make_image(1))
    (tree / "b").mkdir()
    with pytest.raises(InputError, match=r"/b' without images, expected some as in its siblings"):
        build_images(str(tree), str(tmp_path / "x"))
    (tree / "b" / "1.png").write_bytes(make_image(1)[:30])
    with pytest.raises(InputError, match=r"b/1\.png: got no readable image"):
        build_images(str(tree), str(tmp_path / "x"))


@pytest.fixture
def domain_folders(tmp_path):
    """Two domains. The images of their cats share the names 1 and 2; those of their dogs share none."""
    names = [
        "photo/cat/1.png",
        "photo/cat/2.png",
        "photo/cat/3.png",
        "photo/dog/1.png",
        "sketch/cat/2.jpg",
        "sketch/cat/1.jpg",
        "sketch/dog/7.jpg",
    ]
    for k, name in enumerate(names):
        file = tmp_path / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 10 * k).save(file)
    return tmp_path / "pictures"


def test_domains_become_columns_of_the_store(domain_folders, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.arrow"
    arguments = ["data", "images", "--source", domain_folders, "--out", out, "--channels", "1", "--domains"]
    monkeypatch.setattr(sys, "argv", ["distmeta", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"{out}: 2 classes, 7 examples\n"
    store = TaskStore.open(str(out))
    assert (store.classes, store.groups, store.counts) == (["cat", "dog"], ["", ""], [5, 2])
    assert store.images[:, 0, 0, 0].tolist() == [0, 10, 20, 50, 40, 30, 60]
    assert store.domains is not None
    assert store.domains.names == ["photo", "sketch"]
    assert store.domains.domain.tolist() == [0, 0, 0, 1, 1, 0, 1]
    assert store.domains.drawing.tolist() == [0, 1, 2, 0, 1, 0, 1]
    for domain in ("photo", "sketch"):
        (domain_folders / domain / "animals").mkdir()
        for name in ("cat", "dog"):
            (domain_folders / domain / name).rename(domain_folders / domain / "animals" / name)
    build_images(str(domain_folders), str(out), channels=1, domains=True, ink="light")
    grouped = TaskStore.open(str(out))
    assert grouped.groups == ["animals", "animals"]
    assert grouped.domains is not None
    assert (grouped.domains.drawing == store.domains.drawing).all()


def test_wrong_domain_folders_are_refused(domain_folders, tmp_path):
    def build(source=domain_folders):
        build_images(str(source), str(tmp_path / "x.arrow"), domains=True)

    with pytest.raises(InputError, match=r"--source: got '.*/cat' without images, expected CLASS/\*\.png"):
        build(domain_folders / "photo")  # it has no level of domains
    (tmp_path / "one").mkdir()
    domain_folders.rename(tmp_path / "one" / "pictures")
    with pytest.raises(InputError, match=r"--domains: got 1 folders in .* at least two domains"):
        build(tmp_path / "one")
    (tmp_path / "one" / "pictures").rename(domain_folders)
    copy = domain_folders / "photo" / "cat" / "1.jpeg"
    copy.write_bytes((domain_folders / "photo/cat/1.png").read_bytes())
    with pytest.raises(
        InputError, match=r"--domains: got '1\.jpeg' and '1\.png' in photo/cat, expected names"
    ):
        build()
    copy.unlink()
    (domain_folders / "paint" / "animals").mkdir(parents=True)
    (domain_folders / "photo" / "cat").rename(domain_folders / "paint" / "animals" / "cat")
    with pytest.raises(InputError, match=r"got GROUP/CLASS in 'paint' and CLASS in 'photo', expected one"):
        build()
    assert not (tmp_path / "x.arrow").exists()
