"""Domains: the image shifts, stores that have them, and that no drawing is in both parts of an episode."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distmeta.cli import main as cli
from distmeta.data.build import build_images
from distmeta.errors import InputError
from distmeta.seeding import task_ids
from distmeta.tasks.arrow import arrow
from distmeta.tasks.digits import INK, digits
from distmeta.tasks.domains import DOMAINS, NOISE, facing, shifted
from distmeta.tasks.few_shot import FewShot
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.sampling import ClassEntry
from distmeta.tasks.store import Domains, Store, write_store

SHIFTS = [domain for domain in DOMAINS if domain != "original"]
DRAWN = np.random.default_rng(0).integers(0, INK + 1, (20, 1, 8, 8), np.uint8)
PREPARATION = Preparation(size=2)
NAMES = ["photo", "sketch", "paint"]


def test_shifts_by_hand():
    dot = np.zeros((1, 1, 5, 6), np.uint8)
    dot[0, 0, 0, 2] = 16
    assert shifted(dot, "original", 16) is dot
    assert (shifted(dot, "inverted", 16) == 16 - dot).all()
    assert shifted(dot, "blurred", 16)[0, 0, :3].tolist() == [
        [0, 2, 4, 2, 0, 0],
        [0, 1, 2, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    upright = np.zeros((1, 1, 5, 6), np.uint8)
    upright[..., 2] = 16
    assert shifted(upright, "slanted", 16)[0, 0].tolist() == [
        [0, 0, 0, 16, 0, 0],
        [0, 0, 8, 8, 0, 0],
        [0, 0, 16, 0, 0, 0],
        [0, 8, 8, 0, 0, 0],
        [0, 16, 0, 0, 0, 0],
    ]
    grey = np.full((4000, 1, 2, 2), 128, np.uint8)
    noise = shifted(grey, "noisy", 255).astype(float) - 128
    assert abs(noise.mean()) < 2
    assert NOISE == 0.4
    assert (np.abs(noise) > 126).mean() == pytest.approx(
        2 * 0.1056, abs=0.01
    )  # cut at 1.25 deviations: 2 Φ(−1.25)


@pytest.mark.parametrize("domain", DOMAINS)
def test_shifts_are_pure(domain):
    before = DRAWN.copy()
    shown = shifted(DRAWN, domain, INK)
    assert np.array_equal(DRAWN, before)
    assert (shown.dtype, shown.shape) == (np.uint8, DRAWN.shape)
    assert shown.max() <= INK
    assert (shifted(DRAWN[:7], domain, INK) == shown[:7]).all()  # a drawing's noise is its own
    assert (shown == DRAWN).all() == (domain == "original")


drawings = st.lists(st.integers(0, 12), unique=True, min_size=1, max_size=9)


@given(drawings, drawings)
def test_rows_that_face_each_other(first, second):
    drawing = np.array(first + second)
    support, query = facing(np.arange(len(first)), np.arange(len(first), len(drawing)), drawing)
    assert len(support) == len(query) == min(len(first), len(second))
    assert len(set(support)) == len(support)
    assert len(set(query)) == len(query)
    assert support.max() < len(first) <= query.min()
    for i, row in enumerate(support):
        for j, other in enumerate(query):
            assert i == j or drawing[row] != drawing[other]


@st.composite
def stores(draw):
    """Six classes; each has in each domain a few of eight drawings, in any order of rows."""
    of_row, drawing, counts = [], [], []
    for _ in range(6):
        rows = [
            (domain, shown)
            for domain in range(len(NAMES))
            for shown in draw(st.lists(st.integers(0, 7), unique=True, min_size=3, max_size=8))
        ]
        rows = draw(st.permutations(rows))
        counts.append(len(rows))
        of_row += [domain for domain, _ in rows]
        drawing += [shown for _, shown in rows]
    return Domains(NAMES, np.array(of_row, np.int32), np.array(drawing, np.int32)), counts


def written(path, domains, counts):
    """Image r has the number r in its first two pixels."""
    numbers = np.arange(sum(counts))
    images = np.zeros((len(numbers), 1, 2, 2), np.uint8)
    images[:, 0, 0] = np.stack([numbers // 256, numbers % 256], axis=1)
    write_store(path, images, [f"c{k}" for k in range(6)], [""] * 6, counts, PREPARATION, domains)
    return str(path)


def rows_of(x):
    high, low = (x[..., 0, 0, :] * 255).round().long().unbind(-1)
    return (256 * high + low).numpy()


pairs = st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES))


@settings(max_examples=40, deadline=None)
@given(
    stores(), st.none() | pairs, st.none() | pairs, st.integers(0, 2**32),
    st.sampled_from(["train", "val", "test"]),
)  # fmt: skip
def test_an_episode_across_domains(tmp_path_factory, store, trained, evaluated, seed, split):
    domains, counts = store
    path = written(tmp_path_factory.mktemp("s") / "x.arrow", domains, counts)
    options = {}
    if trained:
        options |= {"support_domain": trained[0], "query_domain": trained[1]}
    if evaluated:
        options |= {"eval_support_domain": evaluated[0], "eval_query_domain": evaluated[1]}
    options |= {"ways": 2, "shots": 1, "queries": 2, "test": 2, "val": 2}
    family = arrow(path, **options)
    ids = task_ids(seed, split, 0, 20)
    episode = family.draw(split, ids)
    again = arrow(path, **options).draw(split, ids[3:4])
    assert torch.equal(again.query.x[0], episode.query.x[3])
    support, query = rows_of(episode.support.x), rows_of(episode.query.x)
    label = np.repeat(np.arange(6), counts)
    assert (label[support] == label[query[:, :2]]).all()
    pair = (evaluated or trained) if split != "train" else trained
    for t in range(20):
        assert not set(support[t]) & set(query[t])
        assert len(set(query[t])) == 4
    if pair is None:
        return
    assert (domains.of_row[support] == NAMES.index(pair[0])).all()
    assert (domains.of_row[query] == NAMES.index(pair[1])).all()
    for t in range(20):
        shown = {(label[row], domains.drawing[row]) for row in support[t]}
        assert not shown & {(label[row], domains.drawing[row]) for row in query[t]}


@pytest.fixture
def path(tmp_path):
    """Every class has eight drawings in two domains; the last has no paintings, nor four of its sketches."""
    rows = [(domain, shown) for domain in range(3) for shown in range(8)]
    last = [row for row in rows if row not in [(1, shown) for shown in range(4)] and row[0] != 2]
    of_row, drawing = np.array(rows * 5 + last, np.int32).T
    return written(tmp_path / "x.arrow", Domains(NAMES, of_row, drawing), [24] * 5 + [len(last)])


SMALL = {"ways": 2, "shots": 1, "queries": 2, "test": ["c4", "c5"], "val": ["c3", "c2"]}


def test_a_store_with_domains_comes_back(path):
    store = Store.open(path)
    assert store.domains is not None
    assert store.domains.names == NAMES
    assert store.domains.of_row.tolist() == ([0] * 8 + [1] * 8 + [2] * 8) * 5 + [0] * 8 + [1] * 4
    assert store.domains.drawing.tolist() == list(range(8)) * 16 + [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"support_domain": "photo", "query_domain": "sketsh"},
            r"tasks\.query_domain: got 'sketsh', expected a domain of the store: did you mean 'sketch'\?",
        ),
        ({"support_domain": "zzz", "query_domain": "photo"}, r"'zzz', .*known: paint, photo, sketch"),
        (
            {"support_domain": "photo"},
            r"tasks\.query_domain: got null with tasks\.support_domain 'photo', expected a domain for both",
        ),
        ({"eval_query_domain": "photo"}, r"^tasks\.eval_support_domain: got null with tasks\.eval_query_dom"),
        (
            {"support_domain": "photo", "query_domain": "paint"},
            r"tasks\.query_domain: got 'paint', which class 'c5' has no images of, expected .*known: photo, sketch",
        ),
        (
            {"support_domain": "photo", "query_domain": "sketch", "eval_query_domain": "paint"},
            r"^tasks\.eval_query_domain: got 'paint', which class 'c5'",
        ),
        (
            {"support_domain": "photo", "query_domain": "sketch", "queries": 4},
            r"got 5, expected at most 4 \(class 'c5' of the test split has 4 drawings\)",
        ),
    ],
)
def test_users_mistakes(path, options, message):
    with pytest.raises(InputError, match=message) as caught:
        arrow(path, **{**SMALL, **options})
    assert len(str(caught.value)) < 250


def test_a_store_without_domains(tmp_path):
    plain = written(tmp_path / "plain.arrow", None, [5] * 6)
    assert Store.open(plain).domains is None
    arrow(plain, **SMALL)
    with pytest.raises(
        InputError, match=r"tasks\.support_domain: got 'photo', but this store has no domains"
    ):
        arrow(plain, **SMALL, support_domain="photo", query_domain="photo")


def test_a_shift_that_is_never_trained_on(path):
    family = arrow(path, **SMALL, support_domain="photo", query_domain="photo", eval_query_domain="sketch")
    store = Store.open(path)
    assert store.domains is not None
    for split, wanted in (("train", 0), ("val", 1), ("test", 1)):
        episode = family.draw(split, task_ids(0, split, 0, 30))
        assert set(store.domains.of_row[rows_of(episode.support.x).ravel()]) == {0}
        assert set(store.domains.of_row[rows_of(episode.query.x).ravel()]) == {wanted}


def test_splits_are_disjoint_over_both_parts():
    def entry(rows, query_rows=None, turns=0):
        return ClassEntry(rows, turns, query_rows=query_rows)

    def family(train, val):
        splits = {"train": train, "val": val, "test": [entry([40, 41]), entry([42, 43])]}
        return FewShot(np.zeros((50, 1, 2, 2), np.uint8), splits, ways=2, shots=1, queries=1)

    train = [entry([0, 1], [10, 11]), entry([2, 3], [12, 13])]
    family(train, [entry([4, 5], [14, 15]), entry([6, 7])])
    with pytest.raises(InputError, match="2 drawings in both train and val"):
        family(train, [entry([10, 11]), entry([6, 7])])
    with pytest.raises(InputError, match="2 drawings in both train and val"):
        family(train, [entry([4, 5], [12, 13]), entry([6, 7])])
    with pytest.raises(InputError, match="a drawing twice in the train split"):
        family([entry([0, 1], [1, 0]), entry([2, 3])], [entry([4, 5]), entry([6, 7])])


@pytest.mark.parametrize("domain", SHIFTS)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_digits_are_the_same_drawings_in_another_domain(domain, split):
    """The rows of a draw do not depend on the domain, and within one domain no row is drawn twice."""
    ids = task_ids(0, split, 0, 6)
    plain = digits(ways=3, rotations=False).draw(split, ids)
    across = digits(ways=3, rotations=False, query_domain=domain).draw(split, ids)
    back = digits(ways=3, rotations=False, support_domain=domain, query_domain="original").draw(split, ids)
    both = digits(ways=3, rotations=False, support_domain=domain, query_domain=domain).draw(split, ids)
    assert torch.equal(across.support.x, plain.support.x)
    assert torch.equal(across.query.x, both.query.x)
    assert torch.equal(back.support.x, both.support.x)
    assert torch.equal(back.query.x, plain.query.x)
    assert torch.equal(across.query.y, plain.query.y)
    if domain != "noisy":  # whose noise goes by the drawing, not by the place in an episode
        pixels = (plain.query.x.flatten(0, 1) * INK).numpy().astype(np.uint8)
        shown = torch.from_numpy(shifted(pixels, domain, INK)).float() / INK
        assert torch.equal(across.query.x.flatten(0, 1), shown)


def test_digits_evaluated_on_another_shift():
    ids = task_ids(0, "train", 0, 4)
    family = digits(query_domain="blurred", eval_query_domain="inverted")
    assert torch.equal(
        family.draw("train", ids).query.x, digits(query_domain="blurred").draw("train", ids).query.x
    )
    for split in ("val", "test"):
        ids = task_ids(0, split, 0, 4)
        alone = digits(query_domain="inverted").draw(split, ids)
        assert torch.equal(family.draw(split, ids).query.x, alone.query.x)
        assert torch.equal(family.draw(split, ids).support.x, digits().draw(split, ids).support.x)


@pytest.fixture
def pictures(tmp_path):
    """Two domains; their cats share the names 1 and 2, their dogs none."""
    for k, name in enumerate(
        [
            "photo/cat/1",
            "photo/cat/2",
            "photo/cat/3",
            "photo/dog/1",
            "sketch/cat/2",
            "sketch/cat/1",
            "sketch/dog/7",
        ]
    ):
        file = tmp_path / "pictures" / f"{name}.{'jpg' if 'sketch' in name else 'png'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 10 * k).save(file)
    return tmp_path / "pictures"


def test_build_images_with_domains(pictures, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.arrow"
    arguments = ["data", "images", "--source", pictures, "--out", out, "--channels", "1", "--domains"]
    monkeypatch.setattr(sys, "argv", ["distmeta", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"{out}: 2 classes, 7 examples\n"
    store = Store.open(str(out))
    assert (store.classes, store.groups, store.counts) == (["cat", "dog"], ["", ""], [5, 2])
    assert store.images[:, 0, 0, 0].tolist() == [0, 10, 20, 50, 40, 30, 60]
    assert store.domains is not None
    assert store.domains.names == ["photo", "sketch"]
    assert store.domains.of_row.tolist() == [0, 0, 0, 1, 1, 0, 1]
    assert store.domains.drawing.tolist() == [0, 1, 2, 0, 1, 0, 1]
    for domain in ("photo", "sketch"):
        (pictures / domain / "animals").mkdir()
        for name in ("cat", "dog"):
            (pictures / domain / name).rename(pictures / domain / "animals" / name)
    build_images(str(pictures), str(out), channels=1, domains=True, ink="light")
    grouped = Store.open(str(out))
    assert grouped.groups == ["animals", "animals"]
    assert grouped.domains is not None
    assert (grouped.domains.drawing == store.domains.drawing).all()


def test_build_images_with_domains_mistakes(pictures, tmp_path):
    def built(source=pictures):
        build_images(str(source), str(tmp_path / "x.arrow"), domains=True)

    with pytest.raises(InputError, match=r"--source: got '.*/cat' without images, expected CLASS/\*\.png"):
        built(pictures / "photo")  # no level of domains
    (tmp_path / "one").mkdir()
    pictures.rename(tmp_path / "one" / "pictures")
    with pytest.raises(InputError, match=r"--domains: got 1 folders in .* at least two domains"):
        built(tmp_path / "one")
    (tmp_path / "one" / "pictures").rename(pictures)
    (pictures / "photo" / "cat" / "1.jpeg").write_bytes((pictures / "photo/cat/1.png").read_bytes())
    with pytest.raises(
        InputError, match=r"--domains: got '1\.jpeg' and '1\.png' in photo/cat, expected names"
    ):
        built()
    (pictures / "photo" / "cat" / "1.jpeg").unlink()
    (pictures / "paint" / "animals").mkdir(parents=True)
    (pictures / "photo" / "cat").rename(pictures / "paint" / "animals" / "cat")
    with pytest.raises(InputError, match=r"got GROUP/CLASS in 'paint' and CLASS in 'photo', expected one"):
        built()
    assert not (tmp_path / "x.arrow").exists()
