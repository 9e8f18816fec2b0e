"""Building stores: the real small Omniglot where it is present, made-up archives and folders, downloads."""

import functools
import http.server
import io
import os
import shutil
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distmeta.data import build
from distmeta.data.build import build_images, build_omniglot
from distmeta.errors import InputError
from distmeta.tasks.image_preparation import Preparation, prepare
from distmeta.tasks.store import Store

OMNIGLOT = Path(os.environ.get("DISTMETA_OMNIGLOT") or Path(__file__).parents[3] / "shared/data/omniglot")
real = pytest.mark.skipif(
    not (OMNIGLOT / "images_background_small1.zip").is_file(),
    reason=f"no Omniglot in {OMNIGLOT} (set DISTMETA_OMNIGLOT)",
)


def png(value, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("L", (9, 9), value).save(buffer, kind)
    return buffer.getvalue()


def archive(path, alphabets, extra=(), drawings=20):
    """SET/ALPHABET/characterNN/FILE.png for {alphabet: characters}."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for alphabet, characters in alphabets.items():
            for c in range(characters):
                for d in range(drawings):
                    value = (ord(alphabet[0]) + 7 * c + d) % 256
                    opened.writestr(f"{path.stem}/{alphabet}/character{c + 1:02}/{d:02}.png", png(value))
        for name, data in extra:
            opened.writestr(name, data)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Archives like the small ones, with three alphabets of which B is in both."""
    release = build._Release(("images_background_small1", "images_background_small2"), 3, 5)
    monkeypatch.setattr(build, "_SMALL", (release,))
    full = (build._Release(("images_background",), 1, 1), build._Release(("images_evaluation",), 1, 2))
    monkeypatch.setattr(build, "_FULL", full)
    folder = tmp_path / "source"
    folder.mkdir()
    archive(folder / "images_background_small1.zip", {"A": 1, "B": 2})
    archive(folder / "images_background_small2.zip", {"B": 2, "C": 2})
    return folder


@contextmanager
def served(folder, handler=http.server.SimpleHTTPRequestHandler):
    class Quiet(handler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    ) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@real
def test_real_omniglot(tmp_path):
    out = tmp_path / "omniglot.arrow"
    built = build_omniglot(str(OMNIGLOT), str(out))
    assert built == {"path": str(out), "classes": 242, "examples": 4840}
    store = Store.open(str(out))
    assert store.images.shape == (4840, 1, 28, 28)
    assert len(set(store.groups)) == 8
    assert store.counts == [20] * 242
    assert store.classes[:2] == ["character01", "character02"]
    assert store.preparation == Preparation()
    with zipfile.ZipFile(OMNIGLOT / "images_background_small1.zip") as opened:
        first = opened.read("images_background_small1/Balinese/character01/0108_01.png")
    assert np.array_equal(store.images[0], prepare(first, Preparation()))
    assert 0.05 < store.images.mean() / 255 < 0.15  # ink is the small part


def test_small_archives(small, tmp_path):
    built = build_omniglot(str(small), str(tmp_path / "x.arrow"), size=5)
    assert built == {"path": str(tmp_path / "x.arrow"), "classes": 5, "examples": 100}
    store = Store.open(built["path"])
    assert store.groups == ["A", "B", "B", "C", "C"]
    unpacked = tmp_path / "unpacked"
    for file in small.iterdir():
        shutil.unpack_archive(file, unpacked)
    build_omniglot(str(unpacked), str(tmp_path / "y.arrow"), size=5)
    assert np.array_equal(Store.open(str(tmp_path / "y.arrow")).images, store.images)


def test_auto_prefers_the_full_release(small, tmp_path):
    archive(small / "images_background.zip", {"D": 1})
    assert build_omniglot(str(small), str(tmp_path / "x"))["classes"] == 5
    archive(small / "images_evaluation.zip", {"E": 2})
    assert build_omniglot(str(small), str(tmp_path / "x"))["classes"] == 3
    assert build_omniglot(str(small), str(tmp_path / "x"), which="small")["classes"] == 5
    with served(small) as url:
        assert build_omniglot(url, str(tmp_path / "x"))["classes"] == 3


def test_archives_write_nowhere(small, tmp_path):
    inside = "images_background_small1/../"
    names = [
        "../e.png",
        "/tmp/e.png",
        inside + "../e.png",
        inside + "character01/e.png/../../e.png",
        "__MACOSX/x.png",
    ]
    extra = [(name, png(1)) for name in names]
    archive(small / "images_background_small1.zip", {"A": 1, "B": 2}, extra)
    before = set(tmp_path.rglob("*"))
    assert build_omniglot(str(small), str(tmp_path / "x"))["examples"] == 100
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "x"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda zips: archive(zips[0], {"A": 1, "B": 2}, drawings=19), "got 19 drawings of A/character01"),
        (lambda zips: archive(zips[0], {"A": 2, "B": 2}), "got 3 alphabets and 6 characters"),
        (lambda zips: zips[1].unlink(), "without images_background_small2.zip"),
        (
            lambda zips: zips[1].write_bytes(zips[1].read_bytes()[:-100]),
            "damaged images_background_small2.zip",
        ),
        (lambda zips: zips[1].write_bytes(b"not a zip"), "damaged images_background_small2.zip"),
        (lambda zips: flip(zips[1]), "damaged images_background_small2.zip"),
        (
            lambda zips: archive(zips[0], {"A": 1, "B": 2}, [bad_member(b"no image")]),
            "got 4 alphabets and 6 characters",
        ),
        (lambda zips: archive(zips[0], {"A": 1, "B": 2}, [bad_member(b"0" * (1 << 21))]), "2097152 bytes"),
    ],
)
def test_damaged_archives(small, tmp_path, change, message):
    change([small / "images_background_small1.zip", small / "images_background_small2.zip"])
    with pytest.raises(InputError, match=f"--source: .*({message})") as caught:
        build_omniglot(str(small), str(tmp_path / "x"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def bad_member(data):
    return ("images_background_small1/Z/character01/00.png", data)


def flip(path):
    data = bytearray(path.read_bytes())
    data[90:110] = bytes(20)
    path.write_bytes(data)


def test_damaged_drawings(small, tmp_path):
    folder = tmp_path / "u"
    for file in small.iterdir():
        shutil.unpack_archive(file, folder)
    (folder / "images_background_small2/B/character01/00.png").write_bytes(png(3))
    with pytest.raises(InputError, match=r"two different B/character01/00\.png"):
        build_omniglot(str(folder), str(tmp_path / "x"))
    for name in ("images_background_small1", "images_background_small2"):
        (folder / name / "B/character01/00.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"B/character01/00\.png: got no readable image"):
        build_omniglot(str(folder), str(tmp_path / "x"))


def test_download(small, tmp_path):
    with served(small) as url:
        assert build_omniglot(url + "/", str(tmp_path / "x"))["classes"] == 5  # 404 for the full ones: small
        with pytest.raises(InputError, match=r"--source: got HTTP 404 for http.*/images_background.zip"):
            build_omniglot(url, str(tmp_path / "y"), which="full")
        (small / "images_background_small2.zip").unlink()
        with pytest.raises(InputError, match=r"HTTP 404 for http.*/images_background_small2.zip"):
            build_omniglot(url, str(tmp_path / "y"))
    with pytest.raises(InputError, match="--source: got no answer from http"):
        build_omniglot(url, str(tmp_path / "y"))  # the server is gone
    assert not (tmp_path / "y").exists()


def test_download_that_breaks_off(small, tmp_path):
    class Truncating(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, outputfile):
            outputfile.write(source.read()[:500])

    with (
        served(small, Truncating) as url,
        pytest.raises(InputError, match=r"--source: got 500 bytes of http.*, expected \d+: try again"),
    ):
        build_omniglot(url, str(tmp_path / "x"), which="small")


def test_build_images(tmp_path):
    tree = tmp_path / "tree"
    for name, kind in (
        ("zebra/2.png", "PNG"),
        ("zebra/10.PNG", "PNG"),
        ("ant/1.jpg", "JPEG"),
        ("ant/b.jpeg", "JPEG"),
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(png(200 if "2" in name else 50, kind))
    (tree / "ant" / "notes.txt").write_text("ignored")
    (tree / ".hidden").mkdir()
    built = build_images(str(tree), str(tmp_path / "x"), size=4, ink="light", channels=3)
    assert built == {"path": str(tmp_path / "x"), "classes": 2, "examples": 4}
    store = Store.open(built["path"])
    assert (store.classes, store.groups, store.counts) == (["ant", "zebra"], ["", ""], [2, 2])
    assert store.images[:, 0, 0, 0].tolist() == [50, 50, 50, 200]
    (tmp_path / "grouped").mkdir()
    tree.rename(tmp_path / "grouped" / "animals")
    build_images(str(tmp_path / "grouped"), str(tmp_path / "y"), size=4, ink="light", channels=3)
    assert Store.open(str(tmp_path / "y")).groups == ["animals", "animals"]


def test_build_images_mistakes(tmp_path):
    with pytest.raises(InputError, match=r"--source: got .*expected a folder"):
        build_images(str(tmp_path / "absent"), str(tmp_path / "x"))
    tree = tmp_path / "tree"
    (tree / "a").mkdir(parents=True)
    with pytest.raises(InputError, match="without images"):
        build_images(str(tree), str(tmp_path / "x"))
    (tree / "a" / "1.png").write_bytes(png(1))
    (tree / "b").mkdir()
    with pytest.raises(InputError, match=r"/b' without images, expected some as in its siblings"):
        build_images(str(tree), str(tmp_path / "x"))
    (tree / "b" / "1.png").write_bytes(png(1)[:30])
    with pytest.raises(InputError, match=r"b/1\.png: got no readable image"):
        build_images(str(tree), str(tmp_path / "x"))
    with pytest.raises(InputError, match="--which"):
        build_omniglot(str(tree), str(tmp_path / "x"), which="all")
    with pytest.raises(InputError, match=r"preparation\.size"):
        build_omniglot(str(tree), str(tmp_path / "x"), size=0)
