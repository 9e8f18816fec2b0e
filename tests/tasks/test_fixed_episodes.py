"""Fixed episodes from Parquet: labels, order, images as in the store, and every way a file can be wrong."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from distmeta.errors import InputError
from distmeta.tasks.fixed_episodes import read_episodes
from distmeta.tasks.image_preparation import Preparation, prepare_image, scale_pixels

COLUMNS = {
    "episode": [7, 7, 3, 7, 3, 7, 3],
    "split": ["support", "query", "support", "support", "query", "query", "support"],
    "label": [20, 10, 5, 10, 5, 20, 5],
    "x": [[float(i), i + 0.5] for i in range(7)],
}
LATER_SPLITS = COLUMNS["split"][1:]
LATER_LABELS = COLUMNS["label"][1:]
LATER_X = COLUMNS["x"][1:]
EARLIER_X = COLUMNS["x"][:6]


def write_file(path, types=None, **changes):
    """Write the columns with changes; None leaves a column out."""
    columns = {name: values for name, values in {**COLUMNS, **changes}.items() if values}
    arrays = {name: pa.array(values, (types or {}).get(name)) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path)
    return str(path)


def make_png(value):
    buffer = io.BytesIO()
    Image.new("1", (9, 9), value).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "episodes.parquet"


@pytest.mark.parametrize(
    "types",
    [
        {},
        {"x": pa.list_(pa.float32()), "episode": pa.int32(), "label": pa.uint8()},
        {"x": pa.list_(pa.float64(), 2), "split": pa.large_string()},
        {"x": pa.large_list(pa.float64()), "split": pa.dictionary(pa.int8(), pa.string())},
    ],
)
def test_vectors_are_read_by_episode(path, types, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, second = read_episodes(write_file(path, types=types), (2,))
    assert (first.episode, second.episode) == (7, 3)  # in the file's order
    assert first.labels == [10, 20]
    assert first.support_rows.tolist() == [0, 3]
    assert first.query_rows.tolist() == [1, 5]
    assert first.support.y.tolist() == [1, 0]
    assert first.query.y.tolist() == [0, 1]
    assert first.support.y.dtype == torch.int64
    assert torch.equal(first.query.x, torch.tensor([[1, 1.5], [5, 5.5]]))
    assert first.query.x.dtype == torch.float32
    assert second.labels == [5]
    assert second.support.x.shape == (2, 2)
    assert next(read_episodes(str(path), (1, 2, 1))).support.x.shape == (2, 1, 2, 1)
    assert next(read_episodes(path.as_uri(), (2,))).episode == 7


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_images_are_read_as_in_the_store(path, kind):
    images = [make_png(i % 2) for i in range(7)]
    preparation = Preparation(size=4)
    write_file(path, types={"image": kind}, x=None, image=images)
    first = next(read_episodes(str(path), (1, 4, 4), preparation))
    prepared = np.stack([prepare_image(images[row], preparation) for row in (0, 3)])
    assert np.array_equal(first.support.x.numpy(), scale_pixels(prepared, preparation.scale))
    assert first.support.x[0].eq(1).all()  # dark ink is 1


def test_wrong_images_are_refused(path):
    images = [make_png(i % 2) for i in range(7)]
    preparation = Preparation(size=4)
    write_file(path, x=None, image=images)
    with pytest.raises(
        InputError, match=r"^--episodes: got images prepared to \(1, 4, 4\), expected \(1, 8, 8\)"
    ):
        read_episodes(str(path), (1, 8, 8), preparation)
    with pytest.raises(InputError, match=r"^--episodes: got a column 'image', expected 'x'"):
        read_episodes(str(path), (1,))
    write_file(path, x=None, image=[*images[:5], images[5][:20], images[6]])
    with pytest.raises(InputError, match=r"^--episodes: row 5: got no readable image"):
        list(read_episodes(str(path), (1, 4, 4), preparation))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, "got neither, expected column 'image' or 'x'"),
        ({"image": [b""] * 7}, "got image and x"),
        ({"label": None}, "expected one 'label'"),
        ({"label": ["a"] * 7}, "got column 'label' of type string, expected int"),
        ({"label": [1.0] * 7}, "got column 'label' of type double"),
        ({"episode": ["1"] * 7}, "got column 'episode' of type string"),
        ({"split": [0] * 7}, "got column 'split' of type int64, expected string"),
        ({"x": ["a"] * 7}, "got column 'x' of type string, expected list of float"),
        ({"x": [["a", "b"]] * 7}, "got column 'x' of type list"),
        ({"split": ["train", *LATER_SPLITS]}, r"got split 'train' \(row 0\), expected 'support' or 'query'"),
        ({"split": [None, *LATER_SPLITS]}, "got nulls in column 'split'"),
        ({"label": [None, *LATER_LABELS]}, "got nulls in column 'label'"),
        ({"x": [None, *LATER_X]}, "got nulls in column 'x'"),
        ({"x": [[None, 1.0], *LATER_X]}, "got nulls in the lists of column 'x'"),
        ({"x": [*EARLIER_X, [1.0, float("nan")]]}, "not finite in column 'x' of row 6"),
        ({"x": [*EARLIER_X, [1.0, 1e300]]}, "not finite in column 'x' of row 6"),
        ({"x": [*EARLIER_X, [1.0]]}, r"got 1 numbers in column 'x' of row 6, expected 2"),
        (
            {"label": [20, 11, 5, 10, 5, 20, 5]},
            "got label 11 in the query of episode 7, expected one of its support",
        ),
        (
            {"split": ["support", "support", "support", "support", "query", "support", "support"]},
            "episode 7 without qu",
        ),
        ({"split": ["query"] * 7}, "episode 7 without support"),
    ],
)
def test_wrong_columns_are_refused(path, changes, message):
    write_file(path, **changes)
    with pytest.raises(InputError, match=f"^--episodes: .*{message}") as caught:
        read_episodes(str(path), (2,))
    assert "\n" not in str(caught.value)


def test_labels_beyond_64_bits_and_empty_files_are_refused(path):
    write_file(path, types={"label": pa.uint64()}, label=[2**64 - 1] * 7)
    with pytest.raises(InputError, match=r"^--episodes: got an integer beyond 64 bits"):
        read_episodes(str(path), (2,))
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(InputError, match=r"^--episodes: got no rows"):
        read_episodes(str(path), (2,))


def test_damaged_files_are_refused(path, tmp_path):
    write_file(path)
    data = path.read_bytes()
    half = len(data) // 2
    for damaged in (
        b"",
        b"no parquet",
        data[:-5],
        data[:half],
        data[:half] + data[-8:],
        data.replace(b"label", b"\xffabel"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"^--episodes: got .*no readable Parquet file") as caught:
            read_episodes(str(path), (2,))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"^--episodes: got .*no such file"):
        read_episodes(str(tmp_path / "absent"), (2,))
