"""Domains: the image shifts, stores with domains, and that no drawing is in both parts of an episode."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmeta.errors import InputError
from distmeta.seeding import task_ids
from distmeta.tasks.arrow import arrow
from distmeta.tasks.digits import INK, digits
from distmeta.tasks.domains import NOISE, Domain, pair_drawings, shift_images
from distmeta.tasks.few_shot import FewShot
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.sampling import ClassEntry
from distmeta.tasks.store import DomainColumns, TaskStore, write_store

DOMAINS = get_args(Domain)
SHIFTS = [domain for domain in DOMAINS if domain != "original"]
IMAGES = np.random.default_rng(0).integers(0, INK + 1, (20, 1, 8, 8), np.uint8)
PREPARATION = Preparation(size=2)
NAMES = ["photo", "sketch", "paint"]


def test_shifts_match_those_computed_by_hand():
    dot = np.zeros((1, 1, 5, 6), np.uint8)
    dot[0, 0, 0, 2] = 16
    assert shift_images(dot, "original", 16) is dot
    assert (shift_images(dot, "inverted", 16) == 16 - dot).all()
    assert shift_images(dot, "blurred", 16)[0, 0, :3].tolist() == [
        [0, 2, 4, 2, 0, 0],
        [0, 1, 2, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    upright = np.zeros((1, 1, 5, 6), np.uint8)
    upright[..., 2] = 16
    assert shift_images(upright, "slanted", 16)[0, 0].tolist() == [
        [0, 0, 0, 16, 0, 0],
        [0, 0, 8, 8, 0, 0],
        [0, 0, 16, 0, 0, 0],
        [0, 8, 8, 0, 0, 0],
        [0, 16, 0, 0, 0, 0],
    ]


def test_noise_has_its_standard_deviation():
    grey = np.full((4000, 1, 2, 2), 128, np.uint8)
    noise = shift_images(grey, "noisy", 255).astype(float) - 128
    assert abs(noise.mean()) < 2
    assert NOISE == 0.4
    clipped = (np.abs(noise) > 126).mean()
    assert clipped == pytest.approx(2 * 0.1056, abs=0.01)  # at 1.25 deviations: 2 Φ(−1.25)


@pytest.mark.parametrize("domain", DOMAINS)
def test_shift_depends_only_on_the_image_and_its_number(domain):
    before = IMAGES.copy()
    shifted = shift_images(IMAGES, domain, INK)
    assert np.array_equal(IMAGES, before)
    assert (shifted.dtype, shifted.shape) == (np.uint8, IMAGES.shape)
    assert shifted.max() <= INK
    assert (shift_images(IMAGES[:7], domain, INK) == shifted[:7]).all()
    assert (shifted == IMAGES).all() == (domain == "original")


drawing_lists = st.lists(st.integers(0, 12), unique=True, min_size=1, max_size=9)


@given(drawing_lists, drawing_lists)
def test_paired_rows_never_show_a_drawing_at_two_positions(first, second):
    drawing = np.array(first + second)
    first_rows = np.arange(len(first))
    second_rows = np.arange(len(first), len(drawing))
    support, query = pair_drawings(first_rows, second_rows, drawing)
    assert len(support) == len(query) == min(len(first), len(second))
    assert len(set(support)) == len(support)
    assert len(set(query)) == len(query)
    assert support.max() < len(first) <= query.min()
    for i, row in enumerate(support):
        for j, other in enumerate(query):
            assert i == j or drawing[row] != drawing[other]


@st.composite
def stores(draw):
    """Six classes. Each has a few of eight drawings in each domain, in any order of rows."""
    domain = []
    drawing = []
    counts = []
    for _ in range(6):
        rows = [
            (number, shown)
            for number in range(len(NAMES))
            for shown in draw(st.lists(st.integers(0, 7), unique=True, min_size=3, max_size=8))
        ]
        rows = draw(st.permutations(rows))
        counts.append(len(rows))
        domain += [number for number, _ in rows]
        drawing += [shown for _, shown in rows]
    return DomainColumns(NAMES, np.array(domain, np.int32), np.array(drawing, np.int32)), counts


def write_numbered_store(path, domains, counts):
    """Write a store whose image r has the number r in its first two pixels."""
    numbers = np.arange(sum(counts))
    images = np.zeros((len(numbers), 1, 2, 2), np.uint8)
    images[:, 0, 0] = np.stack([numbers // 256, numbers % 256], axis=1)
    write_store(path, images, [f"c{k}" for k in range(6)], [""] * 6, counts, PREPARATION, domains)
    return str(path)


def read_numbers(x):
    high, low = (x[..., 0, 0, :] * 255).round().long().unbind(-1)
    return (256 * high + low).numpy()


domain_pairs = st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES))


@settings(max_examples=40, deadline=None)
@given(
    stores(),
    st.none() | domain_pairs,
    st.none() | domain_pairs,
    st.integers(0, 2**32),
    st.sampled_from(["train", "val", "test"]),
)
def test_episode_takes_its_parts_from_their_domains(
    tmp_path_factory, store, train_pair, eval_pair, seed, split
):
    domains, counts = store
    path = write_numbered_store(tmp_path_factory.mktemp("s") / "x.arrow", domains, counts)
    options = {"ways": 2, "shots": 1, "queries": 2, "test": 2, "val": 2}
    if train_pair:
        options |= {"support_domain": train_pair[0], "query_domain": train_pair[1]}
    if eval_pair:
        options |= {"eval_support_domain": eval_pair[0], "eval_query_domain": eval_pair[1]}
    ids = task_ids(seed, split, 0, 20)
    episode = arrow(path, **options).draw(split, ids)
    again = arrow(path, **options).draw(split, ids[3:4])
    assert torch.equal(again.query.x[0], episode.query.x[3])
    support = read_numbers(episode.support.x)
    query = read_numbers(episode.query.x)
    label = np.repeat(np.arange(6), counts)
    assert (label[support] == label[query[:, :2]]).all()
    for t in range(20):
        assert not set(support[t]) & set(query[t])
        assert len(set(query[t])) == 4
    pair = (eval_pair or train_pair) if split != "train" else train_pair
    if pair is None:
        return
    assert (domains.domain[support] == NAMES.index(pair[0])).all()
    assert (domains.domain[query] == NAMES.index(pair[1])).all()
    for t in range(20):
        support_drawings = {(label[row], domains.drawing[row]) for row in support[t]}
        query_drawings = {(label[row], domains.drawing[row]) for row in query[t]}
        assert not support_drawings & query_drawings


@pytest.fixture
def path(tmp_path):
    """Classes with eight drawings in three domains. The last class has no paintings and only four sketches."""
    rows = [(domain, shown) for domain in range(3) for shown in range(8)]
    missing = [(1, shown) for shown in range(4)] + [(2, shown) for shown in range(8)]
    last = [row for row in rows if row not in missing]
    domain, drawing = np.array(rows * 5 + last, np.int32).T
    columns = DomainColumns(NAMES, domain, drawing)
    return write_numbered_store(tmp_path / "x.arrow", columns, [24] * 5 + [len(last)])


SMALL = {"ways": 2, "shots": 1, "queries": 2, "test": ["c4", "c5"], "val": ["c3", "c2"]}


def test_store_with_domains_is_read_as_it_was_written(path):
    store = TaskStore.open(path)
    assert store.domains is not None
    assert store.domains.names == NAMES
    assert store.domains.domain.tolist() == ([0] * 8 + [1] * 8 + [2] * 8) * 5 + [0] * 8 + [1] * 4
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
            r"tasks\.query_domain: got 'paint', but class 'c5' has no images of it, expected .*known: photo, sketch",
        ),
        (
            {"support_domain": "photo", "query_domain": "sketch", "eval_query_domain": "paint"},
            r"^tasks\.eval_query_domain: got 'paint', but class 'c5'",
        ),
        (
            {"support_domain": "photo", "query_domain": "sketch", "queries": 4},
            r"got 5, expected at most 4 \(class 'c5' of the test split has 4 drawings\)",
        ),
    ],
)
def test_wrong_domain_is_refused(path, options, message):
    with pytest.raises(InputError, match=message) as caught:
        arrow(path, **{**SMALL, **options})
    assert len(str(caught.value)) < 250


def test_domains_of_a_store_without_domains_are_refused(tmp_path):
    plain = write_numbered_store(tmp_path / "plain.arrow", None, [5] * 6)
    assert TaskStore.open(plain).domains is None
    arrow(plain, **SMALL)
    with pytest.raises(
        InputError, match=r"tasks\.support_domain: got 'photo', but this store has no domains"
    ):
        arrow(plain, **SMALL, support_domain="photo", query_domain="photo")


def test_evaluation_may_have_a_shift_that_training_does_not(path):
    family = arrow(path, **SMALL, support_domain="photo", query_domain="photo", eval_query_domain="sketch")
    store = TaskStore.open(path)
    assert store.domains is not None
    for split, query_domain in (("train", 0), ("val", 1), ("test", 1)):
        episode = family.draw(split, task_ids(0, split, 0, 30))
        assert set(store.domains.domain[read_numbers(episode.support.x).ravel()]) == {0}
        assert set(store.domains.domain[read_numbers(episode.query.x).ravel()]) == {query_domain}


def test_splits_are_disjoint_over_both_parts():
    def entry(rows, query_rows=None, turns=0):
        return ClassEntry(rows, turns, query_rows=query_rows)

    def build_family(train, val):
        splits = {"train": train, "val": val, "test": [entry([40, 41]), entry([42, 43])]}
        return FewShot(np.zeros((50, 1, 2, 2), np.uint8), splits, ways=2, shots=1, queries=1)

    train = [entry([0, 1], [10, 11]), entry([2, 3], [12, 13])]
    build_family(train, [entry([4, 5], [14, 15]), entry([6, 7])])
    with pytest.raises(InputError, match="2 drawings in both train and val"):
        build_family(train, [entry([10, 11]), entry([6, 7])])
    with pytest.raises(InputError, match="2 drawings in both train and val"):
        build_family(train, [entry([4, 5], [12, 13]), entry([6, 7])])
    with pytest.raises(InputError, match="a drawing twice in the train split"):
        build_family([entry([0, 1], [1, 0]), entry([2, 3])], [entry([4, 5]), entry([6, 7])])


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
    if domain != "noisy":  # its noise depends on the drawing's number, which the pixels do not tell
        pixels = (plain.query.x.flatten(0, 1) * INK).numpy().astype(np.uint8)
        shifted = torch.from_numpy(shift_images(pixels, domain, INK)).float() / INK
        assert torch.equal(across.query.x.flatten(0, 1), shifted)


def test_digits_may_be_evaluated_with_another_shift():
    family = digits(query_domain="blurred", eval_query_domain="inverted")
    ids = task_ids(0, "train", 0, 4)
    blurred = digits(query_domain="blurred").draw("train", ids)
    assert torch.equal(family.draw("train", ids).query.x, blurred.query.x)
    for split in ("val", "test"):
        ids = task_ids(0, split, 0, 4)
        inverted = digits(query_domain="inverted").draw(split, ids)
        assert torch.equal(family.draw(split, ids).query.x, inverted.query.x)
        assert torch.equal(family.draw(split, ids).support.x, digits().draw(split, ids).support.x)
