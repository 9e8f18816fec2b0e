"""Who holds theta and adds does not show in the bits of `driver` and `sharded`; keys of a job; going back."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import POLICIES, tree
from outcomes import Watching, outcome, trained
from processes import actor_pids, gone, send, worker_pids

import distmeta
from distmeta.compute.vectors import edges_of, tree_sum
from distmeta.config.job import Job
from distmeta.config.sections import Outer
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime import training as driver
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.failure_policy import LostShardError
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.problem import build
from distmeta.runtime.strategy import LostStateError
from distmeta.strategies import STRATEGIES
from distmeta.strategies.driver import Driver
from distmeta.strategies.slices import Slice, SliceSpec, joined, moments_in, places_of
from distmeta.tracking.mlflow import NoTracker

WIDE = {"type": "mlp", "hidden": [400, 400], "activation": "tanh"}
"""162,001 parameters: three of the norm's blocks, and tensors that lie across their edges."""
RUN = {"steps": 4, "tasks_per_step": 4, "eval_every": 2, "eval_tasks": 4, "workers": 2, "checkpoint_every": 2}
CLIPPED = {
    "clip_norm": 0.05,
    "schedule": {"type": "cosine", "steps": 6, "final": 0.1},
    "rates": {"*bias": 0.02},
}
OUTERS = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, **CLIPPED},
    "adam": {"optimizer": "adam", "lr": 0.003, **CLIPPED},
    "adamw": {"optimizer": "adamw", "lr": 0.003, "weight_decay": 0.1},
    "rmsprop": {"optimizer": "rmsprop", "lr": 0.003, "momentum": 0.5, **CLIPPED},
}


def wide(outer: str = "adam", **run: Any) -> dict[str, Any]:
    return tree("maml", model=WIDE, outer=OUTERS[outer], run=RUN | run)


@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("outer", OUTERS)
def test_slices_step_as_the_whole_to_the_bit(outer: str, servers: int) -> None:
    """Sums, mean, clipping, optimizer; with its state taken over from the whole and given back."""
    job = Job.parse(wide(outer))
    theta = build(job).init()
    whole = ParameterServer(theta, job.outer)
    layout, edges = whole.layout, edges_of(whole.layout.size, servers)
    assert len(edges) == servers + 1
    draws, shapes = np.random.default_rng(0), dict(zip(layout.names, layout.shapes, strict=True))

    def gradients() -> list[np.ndarray]:
        return [layout.flatten({name: normal(shape) for name, shape in shapes.items()}) for _ in range(3)]

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(draws.standard_normal(shape))

    def mean(vectors: list[np.ndarray]) -> np.ndarray:
        return tree_sum(vectors) / np.float32(7)

    whole.step(mean(gradients()))
    tensors, rates = whole.state()[0], dict(zip(layout.names, whole.rates(), strict=True))
    slices = []
    for start, stop in pairwise(edges):
        spans = layout.spans(start, stop)
        names = [span.name for span in spans]
        of_names = tuple(rates[name] for name in names)
        spec = SliceSpec(places_of(spans), of_names, job.outer, moments_in(spans, tensors))
        slices.append((Slice(whole.flat()[start:stop], spec), names, start, stop))
    for step in range(3):
        vectors, partial = gradients(), list[float]()
        for own, _, start, stop in slices:
            for position in (2, 0, 1):
                own.receive(step, position, vectors[position][start:stop])
            finite, sums = own.average(7)
            assert finite
            partial += sums
        size, rates = math.sqrt(math.fsum(partial)), dict(zip(layout.names, whole.rates(), strict=True))
        assert size == whole.step(mean(vectors))
        limit = job.outer.clip_norm
        factor = limit / size if limit is not None and size > limit else None
        parts = [own.step(factor, [rates[name] for name in names]) for own, names, _, _ in slices]
        assert np.array_equal(np.concatenate(parts), whole.flat())
    found = joined(layout, edges, [own.moments() for own, *_ in slices])
    expected = whole.state()[0]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_sharded_through_lost_workers_and_a_lost_server(workplace: Path, cluster: None) -> None:
    calm = outcome(trained(wide(workers=0)))
    seen: list[int] = []

    def kill_a_server() -> None:
        found = actor_pids("SliceServer")
        seen.append(len(found))
        send(found[:1], signal.SIGKILL)

    harm = Watching({1: lambda: send(worker_pids()[:1], signal.SIGKILL), 3: kill_a_server})
    assert outcome(trained(wide(strategy="sharded"), harm)) == calm
    assert seen == [2]
    assert any(text.startswith("lost worker") for text in harm.said), harm.said
    back = [text for text in harm.said if "back to the checkpoint" in text]
    assert [text.rpartition(" ")[2] for text in back] == ["2"], harm.said
    assert not gone(actor_pids("SliceServer"), 30), "they end with the run"


class Forgetful(Driver):
    """Loses everything in step 4, `most` times."""

    most, losses = 2, 0
    gone = False

    def _apply(self) -> float:
        size = super()._apply()
        if self.state().outer["clock"] == 4 and Forgetful.losses < Forgetful.most:
            Forgetful.losses += 1
            self.gone = True
            raise LostStateError("theta is gone")
        return size

    def state(self) -> TrainingState:
        if self.gone:
            raise LostStateError("theta is gone")
        return super().state()

    def load(self, state: TrainingState, outer: Outer) -> None:
        self.gone = False
        super().load(state, outer)


def test_a_state_that_is_lost_again_and_again_ends_the_run_with_its_checkpoint(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done twice is written and tracked once."""

    class Recorder(NoTracker):
        def log_step(self, record: Mapping[str, Any]) -> None:
            tracked.append(record["step"])

    job, watching, tracked = (
        tree("maml", run=RUN | {"workers": 0, "max_shard_failures": 2}),
        Watching(),
        list[int](),
    )
    calm = outcome(trained(job))
    monkeypatch.setattr(driver, "tracker_of", lambda *arguments: Recorder())
    monkeypatch.setitem(STRATEGIES, "driver", f"{__name__}:Forgetful")
    assert outcome(trained(job, watching)) == calm
    assert watching.said.count("theta is gone: back to the checkpoint of step 2") == 2
    assert tracked == [1, 2, 3, 4]
    monkeypatch.setattr(Forgetful, "most", 9)
    with pytest.raises(LostShardError, match=r"^theta is gone, 3 times since step 2$"):
        trained(job, name="doomed")
    assert checkpoints.load(workplace / "runs" / "doomed").progress.step == 2
    trained(job, resume=workplace / "runs" / "doomed", steps=3)
    assert [row["step"] for row in outcome(workplace / "runs" / "doomed")[3]] == [1, 2, 3]


@pytest.mark.slow  # slices are held to the whole by hand above, both ways
def test_checkpoints_of_driver_and_sharded_are_interchangeable(workplace: Path, cluster: None) -> None:
    """With clipping, momentum, rates of parts, and tasks that are left out."""
    job = wide("sgd", tasks_per_step=16) | {"tasks": {"type": "hard_cases:Poisoned"}}
    calm = outcome(trained(job, workers=0, steps=6))
    assert sum(row["tasks_dropped"] for row in calm[3]) > 0
    assert calm[3][0]["grad_norm"] > 0.05, "it is clipped"
    begun = trained(job, workers=0, steps=2, name="begun")
    trained(job, strategy="sharded", servers=2, workers=1, steps=4, resume=begun)
    assert Job.load(begun / "job.yaml").run.strategy == "sharded"
    assert distmeta.evaluate(begun, ["run.eval_tasks=4"]).tasks == 4
    trained(job, workers=0, steps=6, resume=begun)
    assert outcome(begun) == calm


@pytest.mark.slow
def test_sharded_with_outer_epochs_and_changes(workplace: Path, cluster: None) -> None:
    epochs = {"type": "maml-rl", "inner_lr": 0.1, "kl": 0.1, "outer_epochs": 3}
    run = RUN | {"steps": 3}
    changes = [{"step": 1, "set": {"outer.lr": 0.02}}, {"step": 2, "set": {"algorithm.inner_lr": 0.05}}]
    job = tree(epochs, run=run, changes=changes, **POLICIES)
    calm = outcome(trained(job, workers=0))
    watching = Watching()
    assert outcome(trained(job, watching, strategy="sharded", servers=3, workers=1)) == calm
    assert any("go to 1 of 3 servers" in text for text in watching.said), watching.said


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            {"strategy": "sharded", "workers": 0},
            "run.strategy: got 'sharded' with run.workers: 0, expected at least 1 worker",
        ),
        (
            {"servers": 3, "workers": 1},
            "run.servers: got 3 with run.strategy: driver, expected run.strategy: sharded",
        ),
        ({"strategy": "sharded", "servers": 0, "workers": 1}, "run.servers: got 0"),
        (
            {"strategy": "async", "workers": 0},
            "run.strategy: got 'async' with run.workers: 0, expected at least 1 worker",
        ),
        (
            {"strategy": "local", "max_staleness": 2},
            "run.max_staleness: got 2 with run.strategy: local, expected run.strategy: async",
        ),
        (
            {"strategy": "local", "replicas": 5},
            "run.replicas: got 5, expected at most run.shards = 4, their shares of a step",
        ),
        (
            {"strategy": "local", "eval_every": 75},
            "run.eval_every: got 75, expected a multiple of run.local_steps = 50: ",
        ),
        ({"compress": "int4"}, "run.compress: got 'int4'"),
        ({"strategy": "shared"}, "run.strategy: got 'shared'"),
    ],
)
def test_a_strategys_keys_are_its_own(run: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Job.parse(tree("maml", run=run))
    assert str(caught.value).startswith(message)


def test_every_strategy_of_a_job_has_a_class_and_its_keys() -> None:
    from importlib import import_module
    from typing import get_args

    from distmeta.config.combining import KEYS, OWN, Strategy
    from distmeta.config.sections import Run

    assert list(get_args(Strategy)) == list(KEYS) == list(STRATEGIES)
    assert set(OWN) <= set(Run.model_fields)
    for place in STRATEGIES.values():
        module, _, name = place.partition(":")
        assert callable(getattr(import_module(module), name))
