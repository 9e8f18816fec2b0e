"""Fixed episodes from Parquet: labels, order, images as the store's, and every way a file can be wrong."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from distmeta.errors import InputError
from distmeta.tasks.fixed_episodes import read_episodes
from distmeta.tasks.image_preparation import Preparation, prepare, unit

GOOD = {
    "episode": [7, 7, 3, 7, 3, 7, 3],
    "split": ["support", "query", "support", "support", "query", "query", "support"],
    "label": [20, 10, 5, 10, 5, 20, 5],
    "x": [[float(i), i + 0.5] for i in range(7)],
}


def write(path, columns=None, types=None, **changes):
    columns = {
        name: value for name, value in ({**GOOD, **changes} if columns is None else columns).items() if value
    }
    arrays = {name: pa.array(value, (types or {}).get(name)) for name, value in columns.items()}
    pq.write_table(pa.table(arrays), path)
    return str(path)


def png(value):
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
def test_vectors(path, types, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    episodes = list(read_episodes(write(path, types=types), (2,)))
    assert [e.episode for e in episodes] == [7, 3]  # in the file's order
    first, second = episodes
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
def test_images(path, kind):
    images = [png(i % 2) for i in range(7)]
    preparation = Preparation(size=4)
    write(path, types={"image": kind}, x=None, image=images)
    episodes = list(read_episodes(str(path), (1, 4, 4), preparation))
    expected = unit(np.stack([prepare(images[row], preparation) for row in (0, 3)]), preparation.scale)
    assert np.array_equal(episodes[0].support.x.numpy(), expected)
    assert episodes[0].support.x[0].eq(1).all()  # dark ink is 1
    with pytest.raises(
        InputError, match=r"^--episodes: got images prepared to \(1, 4, 4\), expected \(1, 8, 8\)"
    ):
        read_episodes(str(path), (1, 8, 8), preparation)
    with pytest.raises(InputError, match=r"^--episodes: got a column 'image', expected 'x'"):
        read_episodes(str(path), (1,))
    write(path, x=None, image=[*images[:5], images[5][:20], images[6]])
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
        (
            {"split": ["train", *GOOD["split"][1:]]},
            r"got split 'train' \(row 0\), expected 'support' or 'query'",
        ),
        ({"split": [None, *GOOD["split"][1:]]}, "got nulls in column 'split'"),
        ({"label": [None, *GOOD["label"][1:]]}, "got nulls in column 'label'"),
        ({"x": [None, *GOOD["x"][1:]]}, "got nulls in column 'x'"),
        ({"x": [[None, 1.0], *GOOD["x"][1:]]}, "got nulls in the lists of column 'x'"),
        ({"x": [*GOOD["x"][:6], [1.0, float("nan")]]}, "not finite in column 'x' of row 6"),
        ({"x": [*GOOD["x"][:6], [1.0, 1e300]]}, "not finite in column 'x' of row 6"),
        ({"x": [*GOOD["x"][:6], [1.0]]}, r"got 1 numbers in column 'x' of row 6, expected 2"),
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
def test_wrong_files(path, changes, message):
    write(path, **changes)
    with pytest.raises(InputError, match=f"^--episodes: .*{message}") as caught:
        read_episodes(str(path), (2,))
    assert "\n" not in str(caught.value)


def test_other_wrong_files(path, tmp_path):
    write(path, types={"label": pa.uint64()}, label=[2**64 - 1] * 7)
    with pytest.raises(InputError, match=r"^--episodes: got an integer beyond 64 bits"):
        read_episodes(str(path), (2,))
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(InputError, match=r"^--episodes: got no rows"):
        read_episodes(str(path), (2,))
    write(path)
    data = path.read_bytes()
    for cut in (
        b"",
        b"no parquet",
        data[:-5],
        data[: len(data) // 2],
        data[: len(data) // 2] + data[-8:],
        data.replace(b"label", b"\xffabel"),
    ):
        path.write_bytes(cut)
        with pytest.raises(InputError, match=r"^--episodes: got .*no readable Parquet file") as caught:
            read_episodes(str(path), (2,))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"^--episodes: got .*no such file"):
        read_episodes(str(tmp_path / "absent"), (2,))
