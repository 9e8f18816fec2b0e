"""`distmeta submit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from distmeta.cli.options import Json, Overrides, separate_job
from distmeta.cli.output import INTERRUPTED, fail, print_json, print_log, print_note

if TYPE_CHECKING:
    from distmeta.cluster.jobs_client import Submission


def submit(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="Job file; not needed with --resume RUN.")
    ] = None,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="URL of Ray's dashboard.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Show the log and end as the job does.")
    ] = True,
    working_dir: Annotated[str, typer.Option(help="Folder to package: the job, its modules.")] = ".",
    resume: Annotated[str | None, typer.Option(help="Run on the cluster to resume, or auto.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Run distmeta sweep instead of train.")] = False,
    driver_cpus: Annotated[
        float, typer.Option(help="CPUs that the driver reserves, on any node. 0: none, on the head node.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Run a job on a Ray cluster and follow its log."""
    from distmeta.cluster import submit as submission
    from distmeta.cluster.jobs_client import LeftRunning

    path, changes = separate_job(job, overrides)
    try:
        submitted = submission.submit(
            path,
            changes,
            address=address,
            working_dir=working_dir,
            resume=resume,
            sweep=sweep,
            driver_cpus=driver_cpus,
            wait=follow,
            show=print_log,
        )
    except LeftRunning as left:  # typer would turn it into an exit code without a message
        print_note(f"\nno longer following; the job continues:\n{left.submission.next_steps()}")
        fail(
            "no longer following; the job continues",
            as_json,
            INTERRUPTED,
            _list_fields(left.submission),
            quiet=True,
        )
    if submitted.exit_code:
        _fail_as_job(submitted, submitted.exit_code, as_json)
    if submitted.exit_code is None:
        print_note(submitted.next_steps())
    if as_json:
        print_json(_list_fields(submitted))
    else:
        print(submitted.submission_id)


def _fail_as_job(submission: Submission, code: int, as_json: bool) -> NoReturn:
    """End with the job's exit code. Its error is not repeated if the log that was shown ends with it."""
    stopped = submission.status == "STOPPED"
    if stopped:
        print_note(f"stopped; resume with: {submission.resume_command}")
    message = submission.message or "the job was stopped"
    fail(message, as_json, code, _list_fields(submission), quiet=stopped or submission.in_log)


def _list_fields(submission: Submission) -> dict[str, str]:
    return {"submission_id": submission.submission_id, "status": submission.status}
