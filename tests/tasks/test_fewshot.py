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
from distmeta.tasks.sampling import ClassEntry, distinct

CLASSES, DRAWINGS = 12, 6
# Image r has the value r in its first corner and r + 100 in the next, so it tells its row and its rotation.
IMAGES = np.zeros((CLASSES * DRAWINGS, 1, 3, 3), np.uint8)
IMAGES[:, 0, 0, 0] = np.arange(len(IMAGES))
IMAGES[:, 0, 0, 2] = np.arange(len(IMAGES)) + 100


def entries(classes, turns=0, drawings=DRAWINGS):
    return [ClassEntry(range(k * DRAWINGS, k * DRAWINGS + drawings), turns, k // 3, f"c{k}") for k in classes]


SPLITS = {"train": entries(range(6)), "val": entries(range(6, 9)), "test": entries(range(9, 12))}


def family(splits=SPLITS, **options):
    return FewShot(IMAGES, splits, **{"ways": 3, "shots": 2, "queries": 3, "scale": 1.0, **options})


def rows_of(x):
    return x[..., 0, 0, 0].long()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(0, 20), st.integers(0, 2**32))
def test_distinct_is_distinct_and_in_range(n, more, seed):
    counts = np.array([n, n + more])
    picked = distinct(counts, np.random.default_rng(seed).random((2, 2, n)))
    for row, count in zip(picked, counts, strict=True):
        assert len(set(row.tolist())) == n
        assert row.min() >= 0
        assert row.max() < count


def test_every_ordered_choice_is_equally_likely():
    picked = distinct(np.full(40_000, 4), np.random.default_rng(0).random((40_000, 2, 2)))
    _, found = np.unique(picked @ [4, 1], return_counts=True)
    assert len(found) == 12
    chi2 = ((found - 40_000 / 12) ** 2 / (40_000 / 12)).sum()
    assert chi2 < 31.3  # 0.999 quantile with 11 degrees of freedom


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32), st.booleans(),
    st.sampled_from(["train", "val", "test"]),
)  # fmt: skip
def test_episodes(ways, shots, queries, seed, within_group, split):
    tasks = family(ways=ways, shots=shots, queries=queries, within_group=within_group)
    episode = tasks.draw(split, task_ids(seed, split, 0, 5))
    assert isinstance(tasks, TaskFamily)
    assert episode.support.x.shape == (5, shots * ways, 1, 3, 3)
    assert episode.query.x.shape == (5, queries * ways, 1, 3, 3)
    assert episode.support.x.dtype == torch.float32
    assert episode.query.y.dtype == torch.int64
    assert all(leaf.is_contiguous() for part in episode for leaf in part)
    allowed = {row for entry in SPLITS[split] for row in entry.rows}
    for t in range(5):
        support, query = rows_of(episode.support.x[t]), rows_of(episode.query.x[t])
        drawn = torch.cat([support, query]).tolist()
        assert len(set(drawn)) == len(drawn)  # without replacement: nothing in both support and query
        assert set(drawn) <= allowed
        y = torch.cat([episode.support.y[t], episode.query.y[t]]).tolist()
        assert y == list(range(ways)) * (shots + queries)  # shot-major
        classes = {label: {r // DRAWINGS for r, w in zip(drawn, y, strict=True) if w == label} for label in y}
        assert all(len(one) == 1 for one in classes.values())
        assert len(set.union(*classes.values())) == ways
        if within_group:
            assert len({k // 3 for one in classes.values() for k in one}) == 1


def test_a_task_depends_on_its_id_alone():
    ids = task_ids(0, "train", 0, 8)
    together, alone = family().draw("train", ids), family().draw("train", ids[5:6])
    assert torch.equal(together.support.x[5:6], alone.support.x)
    assert torch.equal(together.query.x[5:6], alone.query.x)
    assert family().draw("train", ids[:0]).query.x.shape == (0, 9, 1, 3, 3)


def test_all_classes_and_positions_occur():
    episode = family(ways=2, shots=1, queries=1).draw("train", task_ids(0, "train", 0, 2000))
    classes = rows_of(episode.support.x) // DRAWINGS
    for way in range(2):
        counts = torch.bincount(classes[:, way], minlength=6)
        assert len(counts) == 6
        assert (counts - 2000 / 6).abs().max() < 75  # 4.5 standard deviations


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns(turns):
    splits = SPLITS | {"train": entries(range(3)) + entries(range(3, 6), turns)}
    x = family(splits, ways=6, eval_ways=3).draw("train", task_ids(0, "train", 0, 3)).support.x[..., 0, :, :]
    upright = torch.rot90(x, -turns, dims=(-2, -1))
    turned = torch.where((upright[..., 0, 2] == upright[..., 0, 0] + 100)[..., None, None], upright, x)
    rows = turned[..., 0, 0].long()
    assert torch.equal(turned, torch.from_numpy(IMAGES).float()[rows, 0])
    assert ((rows // DRAWINGS >= 3) == (x != turned).any(-1).any(-1)).all()


def test_rotation_wants_square_images():
    splits = SPLITS | {"train": entries(range(6), 1)}
    with pytest.raises(InputError, match=r"tasks\.rotations: got images of 3x2"):
        FewShot(IMAGES[..., :2], splits, ways=3, shots=1, queries=1)


def test_scale_and_memory_map(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    ids = task_ids(0, "test", 0, 4)
    scaled = FewShot(mapped, SPLITS, ways=3, shots=2, queries=3).draw("test", ids)
    torch.testing.assert_close(scaled.query.x * 255, family().draw("test", ids).query.x)
    floats = FewShot(IMAGES.astype(np.float64), SPLITS, ways=3, shots=2, queries=3, scale=1.0).draw(
        "test", ids
    )
    assert floats.query.x.dtype == torch.float32


def test_evaluation_has_its_own_setting():
    tasks = family(ways=5, eval_ways=3, eval_shots=1, eval_queries=2)
    assert (tasks.out_features, tasks.ways, tasks.eval_ways) == (5, 5, 3)
    assert tasks.draw("train", task_ids(0, "train", 0, 2)).support.x.shape[1] == 10
    episode = tasks.draw("val", task_ids(0, "val", 0, 2))
    assert (episode.support.x.shape[1], episode.query.x.shape[1]) == (3, 6)
    outputs = torch.zeros(6, 5)
    outputs[:, 4] = 9.0  # an output of the head that this episode has no class for
    loss, metrics = tasks.scorer("val")(outputs, Batch(episode.query.x[0], episode.query.y[0]))
    assert loss.item() == pytest.approx(np.log(3))
    assert metrics["accuracy"].item() == pytest.approx(1 / 3)
    assert pickle.loads(pickle.dumps(tasks.scorer("test"))) == ClassificationScore(3)


def test_score_is_differentiable_and_vectorises():
    y, outputs = torch.tensor([0, 1, 2, 1]), torch.randn(3, 4, 5, dtype=torch.float64)

    def loss_of(one):
        return ClassificationScore(3)(one, Batch(y, y))[0]

    grads = torch.func.vmap(torch.func.grad(loss_of))(outputs)
    assert (grads[..., 3:] == 0).all()
    assert torch.autograd.gradgradcheck(loss_of, outputs[0].requires_grad_())
    accuracy = torch.func.vmap(lambda one: ClassificationScore(3)(one, Batch(y, y))[1]["accuracy"])(outputs)
    assert accuracy.shape == (3,)
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
def test_settings_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        family(**options)


def test_splits_that_cannot_be():
    with pytest.raises(InputError, match="6 drawings in both train and test"):
        family(SPLITS | {"test": entries([5, 9, 10])})
    with pytest.raises(InputError, match="a drawing twice in the train split"):
        family(SPLITS | {"train": entries([0, 1, 2, 2])})
    with pytest.raises(InputError, match=r"got 5, expected at most 0 .class 'c1'"):
        family(SPLITS | {"train": entries([0]) + entries([1], drawings=0) + entries([2, 3])})
    with pytest.raises(InputError, match="the test split has 0 classes"):
        family(SPLITS | {"test": []})
    turned = family(SPLITS | {"test": entries(range(6), 1)})  # another rotation is another class
    assert turned.draw("test", task_ids(0, "test", 0, 1)).query.x.shape == (1, 9, 1, 3, 3)
