"""Omniglot's store: the real small release if it is present, made-up archives, downloads."""

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

from distmeta.data import omniglot
from distmeta.data.omniglot import Release, build_omniglot
from distmeta.errors import InputError
from distmeta.tasks.image_preparation import Preparation, prepare_image
from distmeta.tasks.store import TaskStore

OMNIGLOT = Path(os.environ.get("DISTMETA_OMNIGLOT") or Path(__file__).parents[3] / "shared/data/omniglot")
needs_omniglot = pytest.mark.skipif(
    not (OMNIGLOT / "images_background_small1.zip").is_file(),
    reason=f"no Omniglot in {OMNIGLOT} (set DISTMETA_OMNIGLOT)",
)


def make_png(value):
    buffer = io.BytesIO()
    Image.new("L", (9, 9), value).save(buffer, "PNG")
    return buffer.getvalue()


def write_archive(path, alphabets, extra=(), drawings=20):
    """Write SET/ALPHABET/characterNN/FILE.png for {alphabet: characters}."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for alphabet, characters in alphabets.items():
            for c in range(characters):
                for d in range(drawings):
                    value = (ord(alphabet[0]) + 7 * c + d) % 256
                    name = f"{path.stem}/{alphabet}/character{c + 1:02}/{d:02}.png"
                    archive.writestr(name, make_png(value))
        for name, data in extra:
            archive.writestr(name, data)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with archives like the small ones: three alphabets, of which B is in both."""
    small_release = Release(("images_background_small1", "images_background_small2"), 3, 5)
    full_release = (Release(("images_background",), 1, 1), Release(("images_evaluation",), 1, 2))
    monkeypatch.setattr(omniglot, "SMALL", (small_release,))
    monkeypatch.setattr(omniglot, "FULL", full_release)
    folder = tmp_path / "source"
    folder.mkdir()
    write_archive(folder / "images_background_small1.zip", {"A": 1, "B": 2})
    write_archive(folder / "images_background_small2.zip", {"B": 2, "C": 2})
    return folder


@contextmanager
def serve(folder, handler=http.server.SimpleHTTPRequestHandler):
    class QuietHandler(handler):
        def log_message(self, *_):
            pass

    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@needs_omniglot
def test_store_of_real_omniglot(tmp_path):
    out = tmp_path / "omniglot.arrow"
    built = build_omniglot(str(OMNIGLOT), str(out))
    assert built == {"path": str(out), "classes": 242, "examples": 4840}
    store = TaskStore.open(str(out))
    assert store.images.shape == (4840, 1, 28, 28)
    assert len(set(store.groups)) == 8
    assert store.counts == [20] * 242
    assert store.classes[:2] == ["character01", "character02"]
    assert store.preparation == Preparation()
    with zipfile.ZipFile(OMNIGLOT / "images_background_small1.zip") as archive:
        first = archive.read("images_background_small1/Balinese/character01/0108_01.png")
    assert np.array_equal(store.images[0], prepare_image(first, Preparation()))
    assert 0.05 < store.images.mean() / 255 < 0.15  # ink is the small part


def test_archives_and_unpacked_folders_give_the_same_store(small, tmp_path):
    built = build_omniglot(str(small), str(tmp_path / "x.arrow"), size=5)
    assert built == {"path": str(tmp_path / "x.arrow"), "classes": 5, "examples": 100}
    store = TaskStore.open(built["path"])
    assert store.groups == ["A", "B", "B", "C", "C"]
    unpacked = tmp_path / "unpacked"
    for file in small.iterdir():
        shutil.unpack_archive(file, unpacked)
    build_omniglot(str(unpacked), str(tmp_path / "y.arrow"), size=5)
    assert np.array_equal(TaskStore.open(str(tmp_path / "y.arrow")).images, store.images)


def test_auto_prefers_the_full_release(small, tmp_path):
    out = str(tmp_path / "x")
    write_archive(small / "images_background.zip", {"D": 1})
    assert build_omniglot(str(small), out)["classes"] == 5
    write_archive(small / "images_evaluation.zip", {"E": 2})
    assert build_omniglot(str(small), out)["classes"] == 3
    assert build_omniglot(str(small), out, which="small")["classes"] == 5
    with serve(small) as url:
        assert build_omniglot(url, out)["classes"] == 3


def test_paths_in_an_archive_are_never_written_to(small, tmp_path):
    inside = "images_background_small1/../"
    names = [
        "../e.png",
        "/tmp/e.png",
        inside + "../e.png",
        inside + "character01/e.png/../../e.png",
        "__MACOSX/x.png",
    ]
    extra = [(name, make_png(1)) for name in names]
    write_archive(small / "images_background_small1.zip", {"A": 1, "B": 2}, extra)
    before = set(tmp_path.rglob("*"))
    assert build_omniglot(str(small), str(tmp_path / "x"))["examples"] == 100
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "x"}


def make_bad_member(data):
    return ("images_background_small1/Z/character01/00.png", data)


def overwrite_bytes(path):
    data = bytearray(path.read_bytes())
    data[90:110] = bytes(20)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda zips: write_archive(zips[0], {"A": 1, "B": 2}, drawings=19),
            "got 19 drawings of A/character01",
        ),
        (lambda zips: write_archive(zips[0], {"A": 2, "B": 2}), "got 3 alphabets and 6 characters"),
        (lambda zips: zips[1].unlink(), "without images_background_small2.zip"),
        (
            lambda zips: zips[1].write_bytes(zips[1].read_bytes()[:-100]),
            "damaged images_background_small2.zip",
        ),
        (lambda zips: zips[1].write_bytes(b"not a zip"), "damaged images_background_small2.zip"),
        (lambda zips: overwrite_bytes(zips[1]), "damaged images_background_small2.zip"),
        (
            lambda zips: write_archive(zips[0], {"A": 1, "B": 2}, [make_bad_member(b"no image")]),
            "got 4 alphabets and 6 characters",
        ),
        (
            lambda zips: write_archive(zips[0], {"A": 1, "B": 2}, [make_bad_member(b"0" * (1 << 21))]),
            "2097152 bytes",
        ),
    ],
)
def test_damaged_archive_is_refused(small, tmp_path, damage, message):
    damage([small / "images_background_small1.zip", small / "images_background_small2.zip"])
    with pytest.raises(InputError, match=f"--source: .*({message})") as caught:
        build_omniglot(str(small), str(tmp_path / "x"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_damaged_drawing_is_refused(small, tmp_path):
    folder = tmp_path / "unpacked"
    for file in small.iterdir():
        shutil.unpack_archive(file, folder)
    (folder / "images_background_small2/B/character01/00.png").write_bytes(make_png(3))
    with pytest.raises(InputError, match=r"two different B/character01/00\.png"):
        build_omniglot(str(folder), str(tmp_path / "x"))
    for name in ("images_background_small1", "images_background_small2"):
        (folder / name / "B/character01/00.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"B/character01/00\.png: got no readable image"):
        build_omniglot(str(folder), str(tmp_path / "x"))


def test_unknown_release_and_size_are_refused(tmp_path):
    with pytest.raises(InputError, match="--which"):
        build_omniglot(str(tmp_path), str(tmp_path / "x"), which="all")
    with pytest.raises(InputError, match=r"preparation\.size"):
        build_omniglot(str(tmp_path), str(tmp_path / "x"), size=0)


def test_archives_are_downloaded(small, tmp_path):
    out = str(tmp_path / "y")
    with serve(small) as url:
        # the server answers 404 for the full archives, so the small ones are fetched
        assert build_omniglot(url + "/", str(tmp_path / "x"))["classes"] == 5
        with pytest.raises(InputError, match=r"--source: got HTTP 404 for http.*/images_background.zip"):
            build_omniglot(url, out, which="full")
        (small / "images_background_small2.zip").unlink()
        with pytest.raises(InputError, match=r"HTTP 404 for http.*/images_background_small2.zip"):
            build_omniglot(url, out)
    with pytest.raises(InputError, match="--source: got no answer from http"):
        build_omniglot(url, out)  # the server has stopped
    assert not (tmp_path / "y").exists()


def test_download_that_breaks_off_is_refused(small, tmp_path):
    class TruncatingHandler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, outputfile):
            outputfile.write(source.read()[:500])

    with (
        serve(small, TruncatingHandler) as url,
        pytest.raises(InputError, match=r"--source: got 500 bytes of http.*, expected \d+: try again"),
    ):
        build_omniglot(url, str(tmp_path / "x"), which="small")
