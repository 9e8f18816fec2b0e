"""The N-way K-shot sampler: distinct classes, distinct drawings, layout, rotation, splits."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmeta.errors import InputError
from distmeta.protocols import Batch, TaskFamily
from distmeta.seeding import task_ids
from distmeta.tasks.few_shot import ClassificationScore, FewShot
from distmeta.tasks.sampling import ClassEntry, draw_distinct

CLASSES = 12
DRAWINGS = 6
# Image r has the value r in its first corner and r + 100 in the next, so it tells its row and its rotation.
IMAGES = np.zeros((CLASSES * DRAWINGS, 1, 3, 3), np.uint8)
IMAGES[:, 0, 0, 0] = np.arange(len(IMAGES))
IMAGES[:, 0, 0, 2] = np.arange(len(IMAGES)) + 100


def make_entries(classes, turns=0, drawings=DRAWINGS):
    return [ClassEntry(range(k * DRAWINGS, k * DRAWINGS + drawings), turns, k // 3, f"c{k}") for k in classes]


SPLITS = {
    "train": make_entries(range(6)),
    "val": make_entries(range(6, 9)),
    "test": make_entries(range(9, 12)),
}


def build_family(splits=SPLITS, **options):
    return FewShot(IMAGES, splits, **{"ways": 3, "shots": 2, "queries": 3, "scale": 1.0, **options})


def read_rows(x):
    return x[..., 0, 0, 0].long()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(0, 20), st.integers(0, 2**32))
def test_drawn_integers_are_distinct_and_in_range(n, more, seed):
    counts = np.array([n, n + more])
    picked = draw_distinct(counts, np.random.default_rng(seed).random((2, 2, n)))
    for row, count in zip(picked, counts, strict=True):
        assert len(set(row.tolist())) == n
        assert row.min() >= 0
        assert row.max() < count


def test_every_ordered_choice_is_equally_likely():
    picked = draw_distinct(np.full(40_000, 4), np.random.default_rng(0).random((40_000, 2, 2)))
    _, found = np.unique(picked @ [4, 1], return_counts=True)
    assert len(found) == 12
    chi2 = ((found - 40_000 / 12) ** 2 / (40_000 / 12)).sum()
    assert chi2 < 31.3  # 0.999 quantile with 11 degrees of freedom


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2**32),
    st.booleans(),
    st.sampled_from(["train", "val", "test"]),
)
def test_episode_has_distinct_classes_and_drawings(ways, shots, queries, seed, within_group, split):
    family = build_family(ways=ways, shots=shots, queries=queries, within_group=within_group)
    episode = family.draw(split, task_ids(seed, split, 0, 5))
    assert isinstance(family, TaskFamily)
    assert episode.support.x.shape == (5, shots * ways, 1, 3, 3)
    assert episode.query.x.shape == (5, queries * ways, 1, 3, 3)
    assert episode.support.x.dtype == torch.float32
    assert episode.query.y.dtype == torch.int64
    assert all(leaf.is_contiguous() for part in episode for leaf in part)
    allowed = {row for entry in SPLITS[split] for row in entry.rows}
    for t in range(5):
        rows = torch.cat([read_rows(episode.support.x[t]), read_rows(episode.query.x[t])]).tolist()
        assert len(set(rows)) == len(rows)  # nothing is in both support and query
        assert set(rows) <= allowed
        y = torch.cat([episode.support.y[t], episode.query.y[t]]).tolist()
        assert y == list(range(ways)) * (shots + queries)  # shot-major
        classes_of_label = [
            {row // DRAWINGS for row, label in zip(rows, y, strict=True) if label == way}
            for way in range(ways)
        ]
        assert all(len(classes) == 1 for classes in classes_of_label)
        classes = set.union(*classes_of_label)
        assert len(classes) == ways
        if within_group:
            assert len({k // 3 for k in classes}) == 1


def test_task_depends_only_on_its_id():
    ids = task_ids(0, "train", 0, 8)
    together = build_family().draw("train", ids)
    alone = build_family().draw("train", ids[5:6])
    assert torch.equal(together.support.x[5:6], alone.support.x)
    assert torch.equal(together.query.x[5:6], alone.query.x)
    assert build_family().draw("train", ids[:0]).query.x.shape == (0, 9, 1, 3, 3)


def test_every_class_occurs_as_often_in_every_position():
    episode = build_family(ways=2, shots=1, queries=1).draw("train", task_ids(0, "train", 0, 2000))
    classes = read_rows(episode.support.x) // DRAWINGS
    for way in range(2):
        counts = torch.bincount(classes[:, way], minlength=6)
        assert len(counts) == 6
        assert (counts - 2000 / 6).abs().max() < 75  # 4.5 standard deviations


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turned_classes_show_turned_images(turns):
    splits = SPLITS | {"train": make_entries(range(3)) + make_entries(range(3, 6), turns)}
    family = build_family(splits, ways=6, eval_ways=3)
    x = family.draw("train", task_ids(0, "train", 0, 3)).support.x[..., 0, :, :]
    turned_back = torch.rot90(x, -turns, dims=(-2, -1))
    was_turned = turned_back[..., 0, 2] == turned_back[..., 0, 0] + 100
    upright = torch.where(was_turned[..., None, None], turned_back, x)
    rows = upright[..., 0, 0].long()
    assert torch.equal(upright, torch.from_numpy(IMAGES).float()[rows, 0])
    assert ((rows // DRAWINGS >= 3) == (x != upright).any(-1).any(-1)).all()


def test_rotation_of_oblong_images_is_refused():
    splits = SPLITS | {"train": make_entries(range(6), 1)}
    with pytest.raises(InputError, match=r"tasks\.rotations: got images of 3x2"):
        FewShot(IMAGES[..., :2], splits, ways=3, shots=1, queries=1)


def test_images_may_be_memory_mapped_or_float64(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    ids = task_ids(0, "test", 0, 4)
    scaled = FewShot(mapped, SPLITS, ways=3, shots=2, queries=3).draw("test", ids)
    torch.testing.assert_close(scaled.query.x * 255, build_family().draw("test", ids).query.x)
    floats = FewShot(IMAGES.astype(np.float64), SPLITS, ways=3, shots=2, queries=3, scale=1.0)
    assert floats.draw("test", ids).query.x.dtype == torch.float32


def test_evaluation_has_its_own_settings():
    family = build_family(ways=5, eval_ways=3, eval_shots=1, eval_queries=2)
    assert (family.out_features, family.ways, family.eval_ways) == (5, 5, 3)
    assert family.draw("train", task_ids(0, "train", 0, 2)).support.x.shape[1] == 10
    episode = family.draw("val", task_ids(0, "val", 0, 2))
    assert (episode.support.x.shape[1], episode.query.x.shape[1]) == (3, 6)
    outputs = torch.zeros(6, 5)
    outputs[:, 4] = 9.0  # the episode has no class for this output
    loss, metrics = family.scorer("val")(outputs, Batch(episode.query.x[0], episode.query.y[0]))
    assert loss.item() == pytest.approx(np.log(3))
    assert metrics["accuracy"].item() == pytest.approx(1 / 3)
    assert pickle.loads(pickle.dumps(family.scorer("test"))) == ClassificationScore(3)


def test_score_is_differentiable_and_vectorises():
    y = torch.tensor([0, 1, 2, 1])
    outputs = torch.randn(3, 4, 5, dtype=torch.float64)

    def compute_loss(one):
        return ClassificationScore(3)(one, Batch(y, y))[0]

    def compute_accuracy(one):
        return ClassificationScore(3)(one, Batch(y, y))[1]["accuracy"]

    grads = torch.func.vmap(torch.func.grad(compute_loss))(outputs)
    assert (grads[..., 3:] == 0).all()
    assert torch.autograd.gradgradcheck(compute_loss, outputs[0].requires_grad_())
    assert torch.func.vmap(compute_accuracy)(outputs).shape == (3,)
    with pytest.raises(InputError, match="ways: got 6, expected at most 5"):
        ClassificationScore(6)(outputs[0], Batch(y, y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ways": 5},
            r"tasks\.ways: got 5, expected at most 3 \(the val split has 3 classes\): lower tasks.ways or",
        ),
        ({"ways": 7, "eval_ways": 3}, r"tasks\.ways: got 7, expected at most 6 \(the train split"),
        ({"ways": 5, "eval_ways": 4}, r"tasks\.eval_ways: got 4, expected at most 3 \(the val split"),
        ({"min_ways": 4}, r"tasks\.min_ways: got 4, expected from 2 to 3 \(tasks\.ways\)"),
        ({"min_shots": 0}, r"tasks\.min_shots: got 0, expected from 1 to 2 \(tasks\.shots\)"),
        ({"unbalanced": True}, r"tasks\.unbalanced: got true without tasks\.min_shots"),
        ({"ways": 4, "eval_ways": 2, "within_group": True}, r"the largest group of the train split has 3"),
        (
            {"shots": 4},
            r"tasks\.shots \+ tasks\.queries: got 7, expected at most 6 \(class 'c0' of the train",
        ),
        (
            {"eval_queries": 5},
            r"tasks\.eval_shots \+ tasks\.eval_queries: got 7, expected at most 6 \(class 'c6'",
        ),
        ({"shots": 0}, r"tasks\.shots: got 0"),
        ({"eval_queries": 0}, r"tasks\.eval_queries: got 0"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        build_family(**options)


def test_impossible_splits_are_refused():
    with pytest.raises(InputError, match="6 drawings in both train and test"):
        build_family(SPLITS | {"test": make_entries([5, 9, 10])})
    with pytest.raises(InputError, match="a drawing twice in the train split"):
        build_family(SPLITS | {"train": make_entries([0, 1, 2, 2])})
    without_drawings = make_entries([0]) + make_entries([1], drawings=0) + make_entries([2, 3])
    with pytest.raises(InputError, match=r"got 5, expected at most 0 .class 'c1'"):
        build_family(SPLITS | {"train": without_drawings})
    with pytest.raises(InputError, match="the test split has 0 classes"):
        build_family(SPLITS | {"test": []})


def test_another_rotation_is_another_class():
    family = build_family(SPLITS | {"test": make_entries(range(6), 1)})
    assert family.draw("test", task_ids(0, "test", 0, 1)).query.x.shape == (1, 9, 1, 3, 3)
