"""Every way to compute a gradient (compiled, in bfloat16, with constant memory, measured) gives about the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ALGORITHMS, REPOSITORY, tree

import distmeta
from distmeta.algorithms.maml import MAML
from distmeta.compute import compiler
from distmeta.compute.choose_execution import MANY_STEPS, find_fastest
from distmeta.compute.compiler import Compiler
from distmeta.compute.episodes import make_episodes
from distmeta.compute.execution import WHOLE_SHARD, Execution, shard_gradient
from distmeta.compute.gradient import query_loss
from distmeta.compute.numerics import apply_numerics
from distmeta.compute.precision import bfloat16_device, compute_in_bfloat16
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Theta
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.problem import build_problem
from distmeta.runtime.resolve import resolve
from distmeta.runtime.shards import WorkerSpec
from distmeta.runtime.worker import Worker
from distmeta.seeding import task_ids
from distmeta.trees import tree_map

LOOP = Execution("loop", 1)
VMAP = Execution("vmap", WHOLE_SHARD)
CONV = {
    "model": {"type": "conv4", "width": 8, "pool": "stride", "norm": "none"},
    "tasks": {"type": "digits", "ways": 3, "shots": 1, "queries": 2},
}


def gradient(
    job: dict[str, Any], execution: Execution, compiled: Compiler | None = None, dtype: Any = torch.float32
) -> torch.Tensor:
    problem = build_problem(Job.parse(job))
    theta = {name: value.to(dtype) for name, value in problem.init().items()}
    ids = task_ids(0, "train", 0, 4)
    episodes = problem.family.draw("train", ids)
    episodes = tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, episodes)
    arguments = (problem.algorithm, problem.score("train"), theta, episodes, ids, execution, compiled)
    result = shard_gradient(*arguments)
    again = shard_gradient(*arguments)  # only the compiled program, no longer compared with the eager one
    assert all(torch.equal(result.gradient[name], again.gradient[name]) for name in theta)
    return torch.cat([value.flatten() for value in result.gradient.values()])


def relative_distance(one: torch.Tensor, other: torch.Tensor) -> float:
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
        assert relative_distance(whole, steps) <= 1e-9


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
    """Return this process's peak memory in kB. (getrusage would count that of the process that it was forked from.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def wide(inner_steps: int) -> dict[str, Any]:
    """Return a job with inner steps whose graphs are far larger than phi."""
    tasks = {"type": "sinusoid", "shots": 600, "queries": 10}
    algorithm = {"type": "maml", "inner_lr": 1e-3, "inner_steps": inner_steps}
    return tree(algorithm, tasks=tasks, model={"type": "mlp", "hidden": [128, 128]})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_constant_memory_holds_one_steps_graph() -> None:
    """Compare the peak memory of a process: what constant memory adds, and what the whole graph adds to that.

    The allocator returns large blocks at once (`MALLOC_MMAP_THRESHOLD_`), so the peak is what was in use.
    """
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "tests"), "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    constant, more = (int(kilobytes) for kilobytes in done.stdout.split())
    assert more > 5 * constant


@pytest.mark.parametrize(
    ("steps", "changes", "expected"),
    [(MANY_STEPS - 1, CONV, "reverse"), (MANY_STEPS, CONV, "constant-memory"), (MANY_STEPS, {}, "reverse")],
)
def test_differentiation_is_chosen_by_a_fixed_rule(
    steps: int, changes: dict[str, Any], expected: str
) -> None:
    job = tree({"type": "maml", "inner_lr": 0.01, "inner_steps": steps}, **changes)
    problem = resolve(build_problem(Job.parse(job)))
    assert problem.job.compute.differentiation == problem.execution.differentiation == expected


@pytest.mark.parametrize("algorithm", [ALGORITHMS["imaml"], ALGORITHMS["reptile"], ALGORITHMS["fomaml"]])
def test_algorithms_without_inner_graphs_keep_reverse_mode(algorithm: dict[str, Any]) -> None:
    problem = resolve(build_problem(Job.parse(tree(algorithm | {"inner_steps": MANY_STEPS}, **CONV))))
    assert problem.job.compute.differentiation == "reverse"


class UnrollsFromTwiceTheta(MAML):
    """Its gradient in theta is another than that of an unroll from theta."""

    def meta_loss(self, theta: Theta, episode: Any, unroll: Any, score: Any) -> Any:
        state = unroll(self, {name: 2 * value for name, value in theta.items()}, episode.support)
        loss, metrics = score(self.predict(theta, state, episode.query.x), episode.query)
        return loss, {"loss": loss, **metrics}


class UnreducedLoss(MAML):
    def meta_loss(self, theta: Theta, episode: Any, unroll: Any, score: Any) -> Any:
        loss, metrics = query_loss(self, theta, episode, unroll, score)
        return loss[None], metrics


def test_meta_loss_that_breaks_the_protocol_is_refused() -> None:
    job = tree({"type": "test_execution:UnrollsFromTwiceTheta"})
    gradient(job, LOOP)
    with pytest.raises(
        InputError, match=r"compute.differentiation: got constant-memory, .* something other than its theta"
    ):
        gradient(job, LOOP._replace(differentiation="constant-memory"))
    with pytest.raises(InputError, match=r"algorithm: its meta_loss has shape \[1\], expected one number"):
        gradient(tree({"type": "test_execution:UnreducedLoss"}), LOOP)


def test_constant_memory_repeats_the_draws_of_dropout() -> None:
    job = tree(model={"type": "hard_cases:DropoutNet"})
    problem = build_problem(Job.parse(job))
    theta = problem.init()
    ids = task_ids(0, "train", 0, 3)
    episodes = problem.family.draw("train", ids)
    reverse, constant_memory = (
        shard_gradient(
            problem.algorithm, problem.score("train"), theta, episodes, ids, Execution("loop", 1, how)
        )
        for how in ("reverse", "constant-memory")
    )
    for name, value in reverse.gradient.items():
        torch.testing.assert_close(constant_memory.gradient[name], value, rtol=1e-4, atol=1e-6)
    assert all(
        np.array_equal(reverse.metrics[name], constant_memory.metrics[name]) for name in reverse.metrics
    )


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
def test_compiled_gradient_equals_eager_gradient(job: dict[str, Any], execution: Execution) -> None:
    assert relative_distance(gradient(job, execution), gradient(job, execution, Compiler("float32"))) <= 1e-5


def returning(*results: tuple[float, bool, float, float]) -> Any:
    """Return a function whose second call, while it is traced, gives the second (gradient, mask, loss, accuracy)."""
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
def test_different_compiled_result_is_refused(
    compiled: tuple[float, bool, float, float], what: str | None
) -> None:
    """Each part is compared separately: a large loss does not hide a small gradient. An accuracy may jump."""
    function = returning((1e-6, True, 3.0, 0.5), compiled)
    x = torch.ones(3)
    if what is None:
        metrics = Compiler("float32", trace_only=True)("impure", function, x)[2]
        assert torch.allclose(metrics["accuracy_after"], torch.tensor(0.6))
        return
    with pytest.raises(InputError, match=what):
        Compiler("float32", trace_only=True)("impure", function, x)


def test_compiled_result_may_differ_by_the_effect_of_rounding() -> None:
    """At a kink, eager results of inputs that differ by a rounding are as far apart. Elsewhere they are not."""

    def compiled_off_at(x: torch.Tensor) -> None:
        calls = count()

        def function(x: torch.Tensor) -> Any:
            slope = (x > 1).to(x) if next(calls) != 1 else torch.zeros_like(x)
            return {"a": slope}, x > 0, {}

        Compiler("float32", trace_only=True)("kink", function, x)

    compiled_off_at(torch.tensor([1.0 + 1e-6]))
    with pytest.raises(InputError, match="compiled gradient differs from the eager one"):
        compiled_off_at(torch.tensor([1.1]))


def test_compiled_bfloat16_gradient_is_compared_with_float32() -> None:
    """Eager bfloat16 differs from float32 by 2⁻⁹ of the norm here. A compiled result may differ by twice that."""

    def compiled_off_by(relative: float) -> None:
        calls = count()

        def function(x: torch.Tensor) -> Any:
            off = relative if next(calls) == 1 else 0.0
            device = bfloat16_device.get()
            with nullcontext() if device is None else compute_in_bfloat16(device, None):
                product = x @ x
            return {"a": product * (1 + off)}, x > 0, {}

        with apply_numerics(1, False, "bf16"):
            Compiler("bf16", trace_only=True)("off", function, torch.full((1, 1), 1.0 + 2**-8))

    compiled_off_by(1e-3)
    with pytest.raises(InputError, match=r"compiled gradient differs from the eager one"):
        compiled_off_by(0.1)


def test_second_call_runs_the_compiled_program() -> None:
    calls = count()

    def counted(x: torch.Tensor) -> Any:
        next(calls)
        return {"a": x.sin()}, x > 0, {}

    compiled = Compiler("float32")
    first, second = (compiled("counted", counted, torch.ones(3))[0]["a"] for _ in range(2))
    assert torch.equal(first, second)
    assert next(calls) == 2, "once eagerly, once while it is traced"


def test_function_that_cannot_be_compiled_is_refused_with_the_reason() -> None:
    job = tree(model={"type": "hard_cases:BranchingNet"})
    with pytest.raises(
        InputError, match=r"compute.compile: got true, but this cannot be compiled \(.*\): use"
    ):
        gradient(job, LOOP, Compiler("float32"))


def test_model_that_cannot_be_compiled_is_refused_before_anything_is_written(workplace: Path) -> None:
    job = tree(model={"type": "hard_cases:BranchingNet"}, compute={"compile": True})
    with pytest.raises(InputError, match=r"compute.compile: got true, but this cannot be compiled"):
        distmeta.train(Job.parse(job))
    assert not (workplace / "runs").exists()


def test_compiling_dropout_is_refused() -> None:
    with pytest.raises(InputError, match=r"compute.compile: got true for a job that draws random numbers"):
        resolve(
            build_problem(Job.parse(tree(model={"type": "hard_cases:DropoutNet"}, compute={"compile": True})))
        )


def test_run_without_a_compiler_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    reported: list[str] = []
    problem = resolve(build_problem(Job.parse(tree(compute={"compile": True}))), reported.append)
    assert problem.job.compute.compile is False
    (message,) = reported
    assert re.fullmatch(
        r"compute.compile: there is no C\+\+ compiler \(no-such-compiler\) on \S+; "
        "the whole run is computed without compilation",
        message,
    )


def test_worker_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.parse(tree(compute={"compile": True}))
    layout = distmeta.compute.vectors.Layout.from_theta(build_problem(job).init())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"compute.compile: got true, but there is no C\+\+ compiler"):
        Worker.from_spec(WorkerSpec(job.to_dict(), layout, {}, "."))


def test_driver_with_workers_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    job = Job.parse(tree(compute={"compile": True}, run={"workers": 2}))
    assert resolve(build_problem(job)).job.compute.compile is True


def test_missing_tools_for_a_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    assert str(compiler.find_missing_tool("cuda")).startswith("no Triton on ")
    monkeypatch.setattr(compiler, "find_spec", lambda name: name)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    assert str(compiler.find_missing_tool("cuda")).startswith("no C compiler on ")
    monkeypatch.setattr(compiler.shutil, "which", lambda name: name if name == "gcc" else None)
    assert compiler.find_missing_tool("cuda") is None


def test_out_of_memory_while_compiling_is_raised_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not mean that the program cannot be compiled: another worker may have more memory."""
    calls = count()

    def function(x: torch.Tensor) -> Any:
        if next(calls):  # eager is computed first
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x, torch.ones(1, dtype=torch.bool), {}

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        Compiler("float32", trace_only=True)("large", function, torch.ones(2))


def test_drawing_a_task_does_not_seed_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    gradient(tree("maml", model={"type": "hard_cases:DropoutNet"}), LOOP)
    assert seeded == []
    torch.manual_seed(torch.initial_seed())
    assert len(seeded) == 1, "torch.manual_seed does"


def test_bfloat16_gradient_is_near_and_float32() -> None:
    """For convolutional networks see test_bfloat16.py."""
    exact = gradient(tree("maml"), VMAP)
    with apply_numerics(1, False, "bf16"):
        near = gradient(tree("maml"), VMAP)
    assert near.dtype == torch.float32
    assert 1e-5 < relative_distance(exact, near) < 0.2


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


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"compute.precision: got tf32 without GPUs .*, expected float32 or bf16"
    ):
        Job.parse(tree(compute={"precision": "tf32"}))
    with pytest.raises(InputError, match=r"compute.chunk: got 4 with compute.execution: loop"):
        Job.parse(tree(compute={"execution": "loop", "chunk": 4}))
    with pytest.raises(InputError, match=r"compute.chunk: got 4, but compute.execution: auto is loop here"):
        resolve(build_problem(Job.parse(tree(compute={"chunk": 4}, model={"type": "hard_cases:DropoutNet"}))))


def test_run_is_resumed_and_evaluated_without_a_compiler(
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


def test_outputs_of_a_bfloat16_learner_are_float32(workplace: Path) -> None:
    job = tree("matching-fce", compute={"precision": "bf16"}, run={"steps": 1})
    learner = distmeta.load(distmeta.train(Job.parse(job)).run)
    support, query = learner.problem.family.draw("test", task_ids(0, "test", 0, 1))
    assert learner.adapt(support.x[0], support.y[0])(query.x[0]).dtype == torch.float32


def test_run_uses_measured_execution(workplace: Path) -> None:
    job = Job.parse(tree(compute={"execution": "measure"}, run={"steps": 3, "name": "measured"}))
    reported: list[str] = []
    problem = resolve(build_problem(job), reported.append)
    mode = problem.job.compute.execution
    assert mode == problem.execution.mode
    assert mode in ("loop", "vmap")  # which one depends on what else the machine does
    assert reported == [f"compute.execution: measured: {mode}"]
    written = Job.load(distmeta.train(job).run / "job.yaml")
    assert written.compute.execution in ("loop", "vmap")
    assert resolve(build_problem(written)).job == written


def test_fastest_execution_is_chosen() -> None:
    import time

    pauses = {1: 0.02, 2: 0.0, 3: 0.04}
    tried: list[int] = []

    def trial(way: Execution) -> None:
        tried.append(way.chunk)
        time.sleep(pauses[way.chunk])

    ways = [Execution("vmap", chunk) for chunk in pauses]
    assert find_fastest(ways, trial) == ways[1]
    assert tried == [1, 2, 3] * 4


def test_both_differentiations_agree_on_collected_episodes() -> None:
    problem = build_problem(Job.parse(tree(tasks={"type": "hard_cases:TwoArmedBandit"})))
    theta = problem.init()
    ids = task_ids(0, "train", 0, 4)
    episodes = make_episodes(problem.family, problem.algorithm, theta, "train", ids, 2)
    found = []
    for differentiation in ("reverse", "constant-memory"):
        way = VMAP._replace(differentiation=differentiation)
        result = shard_gradient(problem.algorithm, problem.score("train"), theta, episodes, ids, way)
        found.append(np.concatenate([value.flatten().numpy() for value in result.gradient.values()]))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)
