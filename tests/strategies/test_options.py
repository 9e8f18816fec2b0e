"""The options of strategies and their conditions on the rest of the job."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import tree

from distmeta.config.catalog import STRATEGIES
from distmeta.config.job import Job
from distmeta.config.parts import import_part
from distmeta.errors import InputError


@pytest.mark.parametrize(
    ("strategy", "run", "message"),
    [
        (
            {"type": "sharded"},
            {"workers": 0},
            "strategy.type: got 'sharded' with run.workers: 0, expected at least 1 worker",
        ),
        (
            {"type": "async"},
            {"workers": 0},
            "strategy.type: got 'async' with run.workers: 0, expected at least 1 worker",
        ),
        (
            {"type": "all-reduce"},
            {"workers": 0},
            "strategy.type: got 'all-reduce' with run.workers: 0, expected at least 1 worker",
        ),
        (
            {"type": "driver", "servers": 3},
            {"workers": 1},
            "strategy.servers: unknown key of strategy type Driver; it is a key of sharded",
        ),
        (
            {"type": "local", "max_staleness": 2},
            {},
            "strategy.max_staleness: unknown key of strategy type Local; it is a key of async",
        ),
        (
            {"type": "all-reduce", "compress": "int8"},
            {"workers": 2},
            "strategy.compress: unknown key of strategy type AllReduce; it is a key of driver, sharded, async, local",
        ),
        ({"type": "sharded", "servers": 0}, {"workers": 1}, "strategy.servers: got 0"),
        (
            {"type": "local", "replicas": 5},
            {},
            "strategy.replicas: got 5, expected at most run.shards = 4: each replica needs a share",
        ),
        (
            {"type": "local"},
            {"eval_every": 75},
            "run.eval_every: got 75, expected a multiple of strategy.local_steps = 50: ",
        ),
        (
            {"type": "local"},
            {"checkpoint_every": 75},
            "run.checkpoint_every: got 75, expected a multiple of strategy.local_steps = 50: ",
        ),
        ({"type": "driver", "compress": "int4"}, {}, "strategy.compress: got 'int4'"),
        ({"type": "shared"}, {}, "strategy.type: got 'shared'"),
    ],
)
def test_impossible_options_are_refused(strategy: dict[str, Any], run: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Job.parse(tree("maml", strategy=strategy, run=run))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_says_what_it_needs_and_equals(name: str) -> None:
    strategy = import_part("strategy.type", name, STRATEGIES)
    assert strategy.requires_workers is (name in ("sharded", "all-reduce", "async"))
    assert strategy.equals_driver is (name in ("driver", "sharded"))
