"""The commands (DESIGN.md section 7). Nothing heavy is imported before a command runs."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from distmeta.simulation.command import simulate

app = typer.Typer(
    help="Distributed meta-training: one job file, any number of workers, the same numbers to the bit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Build task stores.", no_args_is_help=True)
app.add_typer(data, name="data")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Changes to the job.")]
Json = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout, nothing else.")]


@app.command()
def train(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="Job file; not needed with --resume RUN.")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(help="Run folder to go on with, or auto (with run.name).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a job; prints the run folder."""
    from distmeta.cli.terminal import Terminal
    from distmeta.config.job import Job
    from distmeta.errors import InputError
    from distmeta.runtime import training as driver
    from distmeta.runtime.remote_copy import join
    from distmeta.runtime.run_folder import run_folder

    texts = list(overrides or [])
    if job is not None and "=" in job:
        texts, job = [job, *texts], None
    if job is None:
        if resume is None or resume == "auto":
            raise InputError("JOB: missing, expected a job file (only --resume RUN goes without)")
        loaded = Job.load(run_folder(resume) / "job.yaml", texts)
    else:
        loaded = Job.load(job, texts)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Ray tells there of workers that died, in its own words
            summary = driver.train(loaded, resume, Terminal())
    except driver.InterruptedRun as stop:  # here: typer would swallow it
        _note(f"interrupted: the state after step {stop.step} is saved; go on with:")
        _note(f"  distmeta train --resume {shlex.quote(stop.folder)}")
        more = {"run": stop.folder, "step": stop.step}
        _fail(f"interrupted after step {stop.step}", as_json, 130, more, quiet=True)
    if as_json:
        _print_json({"run": summary.place, "step": summary.step, "loss": summary.loss})
        return
    best = (
        f"; best validation figure {summary.best:.4f} at step {summary.best_step}"
        if summary.best is not None
        else ""
    )
    _note(f"done: step {summary.step}, loss {_number(summary.loss)}{best}")
    next_place = summary.place if summary.best is None else join(summary.place, "checkpoints", "best")
    _note(f"next: distmeta evaluate {shlex.quote(next_place)}")
    print(summary.place)


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="RUN_OR_CHECKPOINT")],
    overrides: Overrides = None,
    episodes: Annotated[str | None, typer.Option(help="Parquet file of fixed episodes.")] = None,
    predictions: Annotated[
        str | None, typer.Option(help="Parquet file to write: episode, row, label, prediction.")
    ] = None,
    figures: Annotated[
        str | None, typer.Option(help="Folder to write: the figures, plots; also to the run in MLflow.")
    ] = None,
    video: Annotated[
        str | None, typer.Option(help=".gif or .mp4 to write of a task of gym, before and after.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Adapt to unseen tasks and score before and after each inner step, with 95 % intervals."""
    from rich.console import Console

    from distmeta.cli.terminal import evaluation_table
    from distmeta.evaluation import evaluate as evaluation

    with contextlib.redirect_stdout(sys.stderr):
        result = evaluation.evaluate(
            checkpoint, overrides or [], episodes, predictions, figures, video, say=_note
        )
    if as_json:
        curves = {"curve": result.curve, "curve_ci95": result.curve_ci95}
        _print_json({"tasks": result.tasks, **result.figures, "ci95": result.ci95, **curves})
    else:
        Console(highlight=False).print(evaluation_table(result))


@app.command()
def sweep(
    job: Annotated[
        str | None,
        typer.Argument(metavar="JOB", help="Job file with a sweep section; not needed with --resume."),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="Folder of a sweep to go on with.")] = None,
    as_json: Json = False,
) -> None:
    """Search the space of a job's sweep section with Ray Tune; prints the sweep's folder."""
    from distmeta.cli.terminal import SweepTable
    from distmeta.config.job import Job
    from distmeta.errors import InputError
    from distmeta.runtime.interruption import InterruptedRun
    from distmeta.sweeps import run as sweeps

    texts = list(overrides or [])
    if job is not None and "=" in job:
        texts, job = [job, *texts], None
    if job is None and resume is None:
        raise InputError("JOB: missing, expected a job file (only --resume FOLDER goes without)")
    loaded = Job.load(job if job is not None else Path(str(resume)) / "job.yaml", texts)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = sweeps.sweep(loaded, resume, SweepTable())
    except InterruptedRun as stop:
        _note("interrupted: finished trials and checkpoints are kept; go on with:")
        _note(f"  distmeta sweep --resume {stop.folder}")
        _fail("interrupted", as_json, 130, {"sweep": stop.folder}, quiet=True)
    best = {"best_run": str(found.best_run), "best": found.best, "trials": len(found.trials)}
    if as_json:
        _print_json(best)
        return
    ends = Counter(trial.status for trial in found.trials)
    spent = sum(trial.steps for trial in found.trials)
    _note(f"done: {', '.join(f'{n} {status}' for status, n in ends.items())}; {spent} steps")
    shown = ", ".join(f"{key}={value}" for key, value in found.best.items())
    _note(f"best: {found.metric} {found.value:.4f} with {shown} ({found.best_run})")
    _note(f"next: distmeta train {found.folder}/sweep/best.yaml")
    print(found.folder)


@app.command()
def submit(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="Job file; not needed with --resume RUN.")
    ] = None,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="URL of Ray's dashboard.")] = None,
    following: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Show the log and end as the job does.")
    ] = True,
    working_dir: Annotated[str, typer.Option(help="Folder to package: the job, its modules.")] = ".",
    resume: Annotated[str | None, typer.Option(help="Run on the cluster to go on with, or auto.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Run distmeta sweep instead of train.")] = False,
    driver_cpus: Annotated[
        float, typer.Option(help="CPUs of the driver, on any node; 0: it runs on the head and asks for none.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Run a job on a Ray cluster, and follow its log."""
    from distmeta.cluster import jobs_client as jobs_api
    from distmeta.cluster import submit as submission

    texts = list(overrides or [])
    if job is not None and "=" in job:
        texts, job = [job, *texts], None
    try:
        ended = submission.submit(
            job, texts, address=address, working_dir=working_dir, resume=resume, sweep=sweep,
            driver_cpus=driver_cpus, wait=following, show=_tell,
        )  # fmt: skip
    except jobs_api.LeftRunning as left:  # here: typer would swallow it
        _note(f"\nnot followed any more; the job goes on:\n{left.submission.next_steps()}")
        more = {"submission_id": left.submission.submission_id, "status": left.submission.status}
        _fail("not followed any more; the job goes on", as_json, 130, more, quiet=True)
    told = {"submission_id": ended.submission_id, "status": ended.status}
    if ended.exit_code:
        stopped = ended.status == "STOPPED"
        if stopped:
            _note(f"stopped; go on with: {ended.to_resume}")
        why = ended.message or "the job was stopped"
        _fail(why, as_json, ended.exit_code, told, quiet=stopped or ended.in_log)
    if ended.exit_code is None:
        _note(ended.next_steps())
    if as_json:
        _print_json(told)
    else:
        print(ended.submission_id)


app.command()(simulate)


@app.command()
def check(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB... [key=value]...")],
    run_one_task: Annotated[
        bool, typer.Option("--run-one-task", help="Also run one task: shapes, purity, dtype, time, memory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Validate one or many jobs without running them."""
    from distmeta.config.job import Job
    from distmeta.errors import InputError

    overrides = [text for text in jobs if "=" in text and not Path(text).exists()]
    paths = [text for text in jobs if text not in overrides]
    if not paths:
        raise InputError("JOB: missing, expected at least one job file")
    for path in paths:
        job = Job.load(path, overrides)
        if run_one_task:
            from distmeta.evaluation.one_task import run_one_task as run

            for line in run(job):
                _note(f"{path}: {line}")
        elif not as_json:
            print(f"{path}: ok")
    if as_json:
        _print_json({"jobs": len(paths)})


@data.command()
def omniglot(
    source: Annotated[str, typer.Option(help="Folder or URL with the authors' zips.")],
    out: Annotated[str, typer.Option(help="Task store to write.")],
    size: Annotated[int, typer.Option(help="Height and width of an image.")] = 28,
    which: Annotated[str, typer.Option(help="auto, small or full: which of the authors' sets.")] = "auto",
    as_json: Json = False,
) -> None:
    """Build a store from Omniglot's zips (Lake et al. 2015)."""
    from distmeta.data.build import build_omniglot

    _print_store(build_omniglot(source, out, size=size, which=which), as_json)  # pyright: ignore[reportArgumentType]


@data.command()
def images(
    source: Annotated[str, typer.Option(help="Folder with one folder a class, or group/class.")],
    out: Annotated[str, typer.Option(help="Task store to write.")],
    size: Annotated[int, typer.Option(help="Height and width of an image.")] = 28,
    ink: Annotated[str, typer.Option(help="dark: dark on light, inverted; light: kept.")] = "light",
    channels: Annotated[int, typer.Option(help="1 (grey) or 3 (colour).")] = 3,
    domains: Annotated[bool, typer.Option("--domains", help="The first folder level is a domain.")] = False,
    as_json: Json = False,
) -> None:
    """Build a store from a tree of image files."""
    from distmeta.data.build import build_images

    built = build_images(source, out, size=size, ink=ink, channels=channels, domains=domains)  # pyright: ignore[reportArgumentType]
    _print_store(built, as_json)


def main() -> NoReturn:
    """Runs a command; exit codes: 0 done, 1 failed, 2 the input is wrong, 130 interrupted."""
    as_json = "--json" in sys.argv[1:]
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        _handle(error, as_json)
    if code == 130:  # typer's answer to a Ctrl-C that no run was there to catch
        _fail("interrupted", as_json, 130)
    sys.exit(code if isinstance(code, int) else 0)


def _handle(error: Exception, as_json: bool) -> NoReturn:
    if isinstance(error, typer.Exit):
        sys.exit(error.exit_code)
    if isinstance(error, typer.Abort):
        _fail("interrupted", as_json, 130)
    if hasattr(error, "format_message"):  # click's usage errors, whose module depends on typer's version
        message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        _fail(message, as_json, 2, quiet=not message)  # no message: the help was printed instead
    from distmeta.errors import InputError, NumericsError

    if isinstance(error, InputError):
        _fail(str(error), as_json, 2)
    from distmeta.runtime.checkpoint import SaveError
    from distmeta.runtime.failure_policy import LostShardError
    from distmeta.sweeps import NothingFoundError

    if not isinstance(error, (NumericsError, LostShardError, SaveError, NothingFoundError)):
        import traceback

        traceback.print_exc()  # not the user's input: whoever mends it needs the place
    _fail(f"{type(error).__name__}: {error}", as_json, 1)


def _fail(
    message: str, as_json: bool, code: int, more: dict[str, Any] | None = None, quiet: bool = False
) -> NoReturn:
    message = " ".join(message.split())
    if as_json:
        _print_json({"error": message, **(more or {})})
    elif not quiet:
        _note(f"error: {message}")
    sys.exit(code)


def _print_store(built: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(built)
    else:
        print(f"{built['path']}: {built['classes']} classes, {built['examples']} examples")


def _print_json(value: dict[str, Any]) -> None:
    from distmeta.files import to_json_value

    print(json.dumps(to_json_value(value), default=str), flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tell(text: str) -> None:
    """A piece of a log: it brings its own ends of lines."""
    print(text, end="", file=sys.stderr, flush=True)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
