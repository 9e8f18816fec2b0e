"""How a gradient is computed (compiled, in bfloat16, step by step, measured) changes little of what it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ALGORITHMS, REPOSITORY, tree

import distmeta
from distmeta.algorithms.maml import MAML
from distmeta.compute import choose_execution as probe
from distmeta.compute import compiler
from distmeta.compute.compiler import Compiler
from distmeta.compute.episodes import episodes_of
from distmeta.compute.gradient import WHOLE_SHARD, Execution, shard_gradient
from distmeta.compute.numerics import numerics
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Theta, query_loss
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.problem import build
from distmeta.runtime.resolve import resolve
from distmeta.runtime.worker import Worker, WorkerSpec
from distmeta.seeding import task_ids

LOOP, VMAP = Execution("loop", 1), Execution("vmap", WHOLE_SHARD)
CONV = {
    "model": {"type": "conv4", "width": 8, "pool": "stride", "norm": "none"},
    "tasks": {"type": "digits", "ways": 3, "shots": 1, "queries": 2},
}


def gradient(
    job: dict[str, Any], execution: Execution, compiled: Compiler | None = None, dtype: Any = torch.float32
) -> torch.Tensor:
    problem = build(Job.parse(job))
    theta = {name: value.to(dtype) for name, value in problem.init().items()}
    ids = task_ids(0, "train", 0, 4)
    episodes = problem.family.draw("train", ids)
    episodes = torch.utils._pytree.tree_map(
        lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, episodes
    )
    arguments = (problem.algorithm, problem.score("train"), theta, episodes, ids, execution, compiled)
    result = shard_gradient(*arguments)
    again = shard_gradient(*arguments)  # the compiled program itself, no longer beside the eager one
    assert all(torch.equal(result.gradient[name], again.gradient[name]) for name in theta)
    return torch.cat([value.flatten() for value in result.gradient.values()])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_constant_memory_is_exact_over_many_steps(optimizer: str) -> None:
    algorithm = {
        "type": "maml",
        "inner_lr": 0.01,
        "inner_steps": 16,
        "inner_optimizer": optimizer,
        "eps": 1e-3,
    }
    for execution in (LOOP, VMAP):
        whole, steps = (
            gradient(tree(algorithm), execution._replace(differentiation=name), dtype=torch.float64)
            for name in ("reverse", "constant-memory")
        )
        assert apart(whole, steps) <= 1e-9


PEAKS = """
from test_execution import LOOP, gradient, peak, wide
gradient(wide(2), LOOP)
peaks = [peak()]
for name in ("constant-memory", "reverse"):
    gradient(wide(20), LOOP._replace(differentiation=name))
    peaks.append(peak())
print(*(b - a for a, b in zip(peaks, peaks[1:])))
"""


def peak() -> int:
    """Kilobytes this program had at its peak. (getrusage counts those of the process that it was forked from.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def wide(inner_steps: int) -> dict[str, Any]:
    """Inner steps whose graphs are far larger than phi."""
    tasks = {"type": "sinusoid", "shots": 600, "queries": 10}
    algorithm = {"type": "maml", "inner_lr": 1e-3, "inner_steps": inner_steps}
    return tree(algorithm, tasks=tasks, model={"type": "mlp", "hidden": [128, 128]})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_constant_memory_holds_one_steps_graph() -> None:
    """Peak memory of a process of its own: what it adds, and what the whole graph adds to that.

    The allocator gives large blocks back at once (`MALLOC_MMAP_THRESHOLD_`), so that the peak is what was in use.
    """
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "tests"), "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    constant, more = (int(kilobytes) for kilobytes in done.stdout.split())
    assert more > 5 * constant


@pytest.mark.parametrize(
    ("steps", "changes", "expected"),
    [(probe.LONG - 1, CONV, "reverse"), (probe.LONG, CONV, "constant-memory"), (probe.LONG, {}, "reverse")],
)
def test_differentiation_is_settled_by_a_fixed_rule(
    steps: int, changes: dict[str, Any], expected: str
) -> None:
    job = tree({"type": "maml", "inner_lr": 0.01, "inner_steps": steps}, **changes)
    problem = resolve(build(Job.parse(job)))
    assert problem.job.compute.differentiation == problem.execution.differentiation == expected


@pytest.mark.parametrize("algorithm", [ALGORITHMS["imaml"], ALGORITHMS["reptile"], ALGORITHMS["fomaml"]])
def test_what_holds_no_graphs_is_left_alone(algorithm: dict[str, Any]) -> None:
    problem = resolve(build(Job.parse(tree(algorithm | {"inner_steps": probe.LONG}, **CONV))))
    assert problem.job.compute.differentiation == "reverse"


class FromElsewhere(MAML):
    """Unrolls from twice its theta, whose gradient is another."""

    def meta_loss(self, theta: Theta, episode: Any, unroll: Any, score: Any) -> Any:
        state = unroll(self, {name: 2 * value for name, value in theta.items()}, episode.support)
        loss, metrics = score(self.predict(theta, state, episode.query.x), episode.query)
        return loss, {"loss": loss, **metrics}


class Unreduced(MAML):
    def meta_loss(self, theta: Theta, episode: Any, unroll: Any, score: Any) -> Any:
        loss, metrics = query_loss(self, theta, episode, unroll, score)
        return loss[None], metrics


def test_a_meta_loss_that_breaks_the_protocol_is_named() -> None:
    job = tree({"type": "test_execution:FromElsewhere"})
    gradient(job, LOOP)
    with pytest.raises(
        InputError, match=r"compute.differentiation: got constant-memory, .* other than its own theta"
    ):
        gradient(job, LOOP._replace(differentiation="constant-memory"))
    with pytest.raises(InputError, match=r"algorithm: its meta_loss has shape \[1\], expected one number"):
        gradient(tree({"type": "test_execution:Unreduced"}), LOOP)


def test_constant_memory_is_refused_where_steps_draw() -> None:
    job = tree(model={"type": "hard_cases:Dropout"}, compute={"differentiation": "constant-memory"})
    with pytest.raises(InputError, match=r"compute.differentiation: got constant-memory, .* \(dropout\)"):
        resolve(build(Job.parse(job)))


@pytest.mark.parametrize(
    ("job", "execution"),
    [
        (tree({"type": "maml", "inner_steps": 1}), VMAP),
        *(
            pytest.param(job, how, marks=pytest.mark.slow)
            for job, how in ((tree("maml"), VMAP), (tree("maml", **CONV), LOOP))
        ),
    ],
)
def test_a_compiled_gradient_is_the_eager_one(job: dict[str, Any], execution: Execution) -> None:
    assert apart(gradient(job, execution), gradient(job, execution, Compiler("float32"))) <= 1e-5


def returning(*results: tuple[float, bool, float, float]) -> Any:
    """A function whose second call, while it is traced, gives the second (gradient, mask, loss, accuracy)."""
    calls = iter([*results, *[results[0]] * 9])

    def impure(x: torch.Tensor) -> Any:
        gradient, mask, loss, accuracy = next(calls)
        return (
            {"a": x * gradient},
            x > (-1 if mask else 9),
            {"loss_after": x * loss, "accuracy_after": x * accuracy},
        )

    return impure


@pytest.mark.parametrize(
    ("compiled", "what"),
    [
        ((2e-6, True, 3.0, 0.5), r"gradient differs from the eager one by 1.0e\+00 of its norm"),
        ((1e-6, False, 3.0, 0.5), r"gradients are finite for different tasks"),
        ((1e-6, True, 3.1, 0.5), r"loss_after differs"),
        ((1e-6, True, 3.0, 0.6), None),
    ],
)
def test_a_compiled_result_that_differs_is_refused(
    compiled: tuple[float, bool, float, float], what: str | None
) -> None:
    """Each part by itself: a small gradient is not hidden by a large loss, and an accuracy may jump."""
    function, x = returning((1e-6, True, 3.0, 0.5), compiled), torch.ones(3)
    if what is None:
        metrics = Compiler("float32", trace_only=True)("impure", function, x)[2]
        assert torch.allclose(metrics["accuracy_after"], torch.tensor(0.6))
        return
    with pytest.raises(InputError, match=what):
        Compiler("float32", trace_only=True)("impure", function, x)


def test_a_compiled_result_may_be_off_by_what_a_rounding_makes() -> None:
    """At a kink eager results that are a rounding apart differ as much; elsewhere they do not."""

    def compiled_off_at(x: torch.Tensor) -> None:
        calls = count()

        def function(x: torch.Tensor) -> Any:
            slope = (x > 1).to(x) if next(calls) != 1 else torch.zeros_like(x)
            return {"a": slope}, x > 0, {}

        Compiler("float32", trace_only=True)("kink", function, x)

    compiled_off_at(torch.tensor([1.0 + 1e-6]))
    with pytest.raises(InputError, match="compiled gradient differs from the eager one"):
        compiled_off_at(torch.tensor([1.1]))


def test_in_bfloat16_a_compiled_gradient_is_held_against_float32() -> None:
    """Eager bfloat16 is off by 2⁻⁹ of its norm here: a compiled result may be off twice as far, not more."""

    def compiled_off_by(relative: float) -> None:
        calls = count()

        def function(x: torch.Tensor) -> Any:
            off = relative if next(calls) == 1 else 0.0
            return {"a": (x @ x) * (1 + off)}, x > 0, {}

        with numerics(1, False, "bf16"):
            Compiler("bf16", trace_only=True)("off", function, torch.full((1, 1), 1.0 + 2**-8))

    compiled_off_by(1e-3)
    with pytest.raises(InputError, match=r"compiled gradient differs from the eager one"):
        compiled_off_by(0.1)


def test_a_later_call_runs_the_compiled_program() -> None:
    calls = count()

    def counted(x: torch.Tensor) -> Any:
        next(calls)
        return {"a": x.sin()}, x > 0, {}

    compiled = Compiler("float32")
    first, second = (compiled("counted", counted, torch.ones(3))[0]["a"] for _ in range(2))
    assert torch.equal(first, second)
    assert next(calls) == 2, "once by itself, once while traced"


def test_what_cannot_be_compiled_says_why() -> None:
    job = tree(model={"type": "test_models:Branching"})
    with pytest.raises(
        InputError, match=r"compute.compile: got true, but this cannot be compiled \(.*\): use"
    ):
        gradient(job, LOOP, Compiler("float32"))


def test_what_cannot_be_compiled_is_found_out_before_anything_is_written(workplace: Path) -> None:
    job = tree(model={"type": "test_models:Branching"}, compute={"compile": True})
    with pytest.raises(InputError, match=r"compute.compile: got true, but this cannot be compiled"):
        distmeta.train(Job.parse(job))
    assert not (workplace / "runs").exists()


def test_what_is_not_compiled_by_design_is_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"compute.compile: got true for a model that draws random numbers"):
        resolve(build(Job.parse(tree(model={"type": "hard_cases:Dropout"}, compute={"compile": True}))))


def test_without_a_compiler_the_whole_run_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    said: list[str] = []
    problem = resolve(build(Job.parse(tree(compute={"compile": True}))), said.append)
    assert problem.job.compute.compile is False
    (told,) = said
    assert re.fullmatch(
        r"compute.compile: there is no C\+\+ compiler \(no-such-compiler\) on \S+; the whole run goes without",
        told,
    )


def test_a_worker_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.parse(tree(compute={"compile": True}))
    layout = distmeta.compute.vectors.Layout.of(build(job).init())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"compute.compile: got true, but there is no C\+\+ compiler"):
        Worker(WorkerSpec(job.tree(), layout, {}, "."))


def test_beside_workers_it_is_their_compilers_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    job = Job.parse(tree(compute={"compile": True}, run={"workers": 2}))
    assert resolve(build(job)).job.compute.compile is True


def test_what_a_gpus_compiler_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    assert str(compiler.missing("cuda")).startswith("no Triton on ")
    monkeypatch.setattr(compiler, "find_spec", lambda name: name)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    assert str(compiler.missing("cuda")).startswith("no C compiler on ")
    monkeypatch.setattr(compiler.shutil, "which", lambda name: name if name == "gcc" else None)
    assert compiler.missing("cuda") is None


def test_memory_that_runs_out_while_compiling_is_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not a program that cannot be compiled: another worker may have more."""
    calls = count()

    def function(x: torch.Tensor) -> Any:
        if next(calls):  # eager is computed first
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x, torch.ones(1, dtype=torch.bool), {}

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        Compiler("float32", trace_only=True)("large", function, torch.ones(2))


def test_a_tasks_draws_seed_no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    gradient(tree("maml", model={"type": "hard_cases:Dropout"}), LOOP)
    assert seeded == []
    torch.manual_seed(torch.initial_seed())
    assert len(seeded) == 1, "what torch's own does"


@pytest.mark.parametrize(("job", "execution"), [(tree("maml"), VMAP), (tree("maml", **CONV), LOOP)])
def test_bfloat16_is_near_and_theta_stays_float32(job: dict[str, Any], execution: Execution) -> None:
    exact = gradient(job, execution)
    with numerics(1, False, "bf16"):
        near = gradient(job, execution)
    assert near.dtype == torch.float32
    assert 1e-5 < apart(exact, near) < 0.2


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_in_bfloat16_vmap_is_as_near_as_the_loop(norm: str) -> None:
    job = tree("maml", **CONV | {"model": CONV["model"] | {"norm": norm}})
    exact = gradient(job, LOOP)
    with numerics(1, False, "bf16"):
        loop, vmap = (apart(exact, gradient(job, execution)) for execution in (LOOP, VMAP))
    assert 1e-5 < vmap < 2 * loop


def test_training_in_bfloat16_learns(workplace: Path) -> None:
    tasks = {"type": "linear", "shots": 5, "queries": 5, "slope": [0.5, 1.0], "offset": [-1, 1]}
    job = tree(
        tasks=tasks, compute={"precision": "bf16"}, run={"steps": 60, "eval_every": 60, "eval_tasks": 50}
    )
    run = distmeta.train(Job.parse(job)).run
    stored = checkpoints.load(run)
    assert all(value.dtype == torch.float32 for value in stored.theta.values())
    first, last = (distmeta.evaluate(run / "checkpoints" / f"step-{k:08d}") for k in (0, 60))
    assert last.figures["loss_after"] < 0.5 * first.figures["loss_after"]


def test_settings_that_go_with_nothing_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"compute.precision: got tf32 without GPUs .*, expected float32 or bf16"
    ):
        Job.parse(tree(compute={"precision": "tf32"}))
    with pytest.raises(InputError, match=r"compute.chunk: got 4 with compute.execution: loop"):
        Job.parse(tree(compute={"execution": "loop", "chunk": 4}))
    with pytest.raises(InputError, match=r"compute.chunk: got 4, but compute.execution: auto is loop here"):
        resolve(build(Job.parse(tree(compute={"chunk": 4}, model={"type": "hard_cases:Dropout"}))))


def test_a_compiled_run_is_evaluated_without_a_compiler(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = distmeta.train(Job.parse(tree(run={"steps": 1}))).run
    text = (run / "checkpoints" / "step-00000001" / "state.json").read_text()
    assert '"compile": false' in text
    monkeypatch.setenv("CXX", "no-such-compiler")
    resumed = distmeta.train(Job.parse(tree(run={"steps": 2}, compute={"compile": True})), resume=run)
    assert Job.load(resumed.run / "job.yaml").compute.compile is False
    with pytest.raises(InputError, match=r"compute.execution: got measure, which is for training"):
        distmeta.evaluate(run, ["compute.execution=measure"])


def test_outputs_are_float32_in_bfloat16_too(workplace: Path) -> None:
    job = tree("matching-fce", compute={"precision": "bf16"}, run={"steps": 1})
    learner = distmeta.load(distmeta.train(Job.parse(job)).run)
    support, query = learner.problem.family.draw("test", task_ids(0, "test", 0, 1))
    assert learner.adapt(support.x[0], support.y[0])(query.x[0]).dtype == torch.float32


def test_what_was_measured_is_written_down_and_obeyed(workplace: Path) -> None:
    job = Job.parse(tree(compute={"execution": "measure"}, run={"steps": 3, "name": "measured"}))
    said: list[str] = []
    problem = resolve(build(job), said.append)
    mode = problem.job.compute.execution
    assert mode == problem.execution.mode
    assert mode in ("loop", "vmap")  # which one depends on what else the machine does
    assert said == [f"compute.execution: measured: {mode}"]
    written = Job.load(distmeta.train(job).run / "job.yaml")
    assert written.compute.execution in ("loop", "vmap")
    assert resolve(build(written)).job == written


def test_the_fastest_way_is_taken() -> None:
    import time

    pauses = {1: 0.02, 2: 0.0, 3: 0.04}
    tried: list[int] = []

    def trial(way: Execution) -> None:
        tried.append(way.chunk)
        time.sleep(pauses[way.chunk])

    ways = [Execution("vmap", chunk) for chunk in pauses]
    assert probe.fastest(ways, trial) == ways[1]
    assert tried == [1, 2, 3] * 4


def test_collected_episodes_go_through_every_way() -> None:
    problem = build(Job.parse(tree(tasks={"type": "hard_cases:Bandit"})))
    theta, ids = problem.init(), task_ids(0, "train", 0, 4)
    episodes = episodes_of(problem.family, problem.algorithm, theta, "train", ids, 2)
    found = []
    for differentiation in ("reverse", "constant-memory"):
        way = VMAP._replace(differentiation=differentiation)
        result = shard_gradient(problem.algorithm, problem.score("train"), theta, episodes, ids, way)
        found.append(np.concatenate([value.flatten().numpy() for value in result.gradient.values()]))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)
