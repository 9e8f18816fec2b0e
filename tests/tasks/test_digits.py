"""scikit-learn's digits: which turned digits are classes, and that the splits share none."""

import pytest
import torch

from distmeta.errors import InputError
from distmeta.seeding import task_ids
from distmeta.tasks.digits import canonicalize_digit, choose_classes, digits
from distmeta.tasks.image_preparation import Preparation


def test_digits_that_look_alike_are_the_same():
    assert canonicalize_digit(9, 0) == canonicalize_digit(6, 2)
    assert canonicalize_digit(9, 3) == canonicalize_digit(6, 1)
    assert canonicalize_digit(8, 2) == canonicalize_digit(8, 0) != canonicalize_digit(8, 1)
    assert len({canonicalize_digit(7, turns) for turns in range(4)}) == 4
    all_looks = {canonicalize_digit(digit, turns) for digit in range(10) for turns in range(4)}
    assert len(all_looks) == 3 * 2 + 7 * 4 - 4


def test_default_splits_have_the_documented_classes():
    train, test = choose_classes([7, 8, 9])
    assert test == [(7, 0), (7, 1), (8, 0), (8, 1), (9, 0), (9, 1)]
    assert len(train) == 2 + 2 + 4 * 4 + 2
    assert [turns for digit, turns in train if digit == 6] == [0, 1]  # turned further it looks like a test 9
    assert [turns for digit, turns in train if digit in (0, 1)] == [0, 1, 0, 1]


@pytest.mark.parametrize("test_digits", [[7, 8, 9], [6], [9], [6, 9], [0, 1, 8], [2, 3, 4, 5, 6, 7, 8, 9]])
@pytest.mark.parametrize("rotations", [True, False])
def test_no_two_classes_look_alike(test_digits, rotations):
    train, test = choose_classes(test_digits, rotations)
    looks = [canonicalize_digit(*turned) for turned in train + test]
    assert len(set(looks)) == len(looks)
    assert {digit for digit, _ in test} == set(test_digits)


def test_episodes_have_the_declared_shapes():
    family = digits()
    assert family.in_shape == (1, 8, 8)
    assert family.out_features == 5
    assert family.preparation == Preparation(size=8, filter="box", ink="light")
    for split in ("train", "val", "test"):
        episode = family.draw(split, task_ids(0, split, 0, 3))
        assert episode.support.x.shape == (3, 5, 1, 8, 8)
        assert episode.query.x.shape == (3, 75, 1, 8, 8)
        assert episode.query.x.min() == 0
        assert episode.query.x.max() == 1
    upright = digits(ways=7, eval_ways=3, rotations=False).draw("test", task_ids(0, "test", 0, 1))
    assert torch.equal(upright.support.y, torch.tensor([[0, 1, 2]]))


def test_nearest_neighbour_leaves_something_to_learn():
    episode = digits().draw("test", task_ids(0, "test", 0, 100))
    nearest = torch.cdist(episode.query.x.flatten(2), episode.support.x.flatten(2)).argmin(-1)
    accuracy = (episode.support.y.gather(1, nearest) == episode.query.y).float().mean().item()
    assert 0.70 < accuracy < 0.86  # 78.4 % on 600 episodes


def test_wrong_options_are_refused():
    with pytest.raises(InputError, match=r"tasks\.ways: got 7, expected at most 6 \(the test split"):
        digits(ways=7)
    with pytest.raises(InputError, match=r"tasks\.ways: got 5, expected at most 3"):
        digits(rotations=False)
    for wrong in ([], [7, 7], [10], list(range(10))):
        with pytest.raises(InputError, match=r"tasks\.test_digits"):
            digits(test_digits=wrong)
    with pytest.raises(InputError, match=r"tasks\.eval_shots \+ tasks\.eval_queries: got 40"):
        digits(queries=39)
