"""What distmeta expects of a tracker: a class that copies the history of runs to a store (MLflow, TensorBoard, …).

A job names trackers as `tracking: {type: mlflow}`, or as a list of such sections. `type` is a name from the table of
shipped trackers or `package.module:Name`; the other keys are keyword arguments of the class. There is no base class
and nothing to register. The smallest tracker has a constructor, `open`, `log_step`, `log_artifact` and `close`:

    class PrintTracker:
        run_id = None
        last_step = 0

        def __init__(self, run: TrackedRun, prefix: str = ""): ...
        def open(self) -> None: ...
        def log_step(self, record: StepRecord) -> None:
            print(self.prefix, record.step, record.values)
        def log_artifact(self, path: Path, folder: str) -> None: ...
        def close(self, status: Status) -> None: ...

distmeta calls the constructor in the main thread and all other methods in one background thread per tracker
(`tracking.background`). They may therefore block and raise. Training neither waits for a tracker nor fails with it: a
call that raised is repeated later. The run folder's `metrics.jsonl` is complete; what a tracker keeps is a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended. KILLED: it was interrupted and can be resumed."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about the run: the one argument that distmeta gives to its constructor."""

    name: str
    """Name of the run folder."""
    folder: Path
    """The run folder. It may not exist yet when the constructor or `open` is called. It exists when `log_step` is."""
    report: Callable[[str], None]
    """Shows a line to the user. Any thread may call it."""
    experiment: str = ""
    """What runs are grouped by: the job's name."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """The job as plain data, nested."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Further texts about the run, for example where its folder is."""
    run_id: str | None = None
    """The tracker's own `run_id` of the run to continue; None starts a new one."""
    tables: tuple[str, ...] = ()
    """Names of artifacts that a store may show as tables: JSON files with `columns` and `data`."""


class StepRecord(NamedTuple):
    """The numbers of one outer step: one line of metrics.jsonl."""

    step: int
    """Completed outer steps, from 1."""
    time: float
    """When the run reported the step, in seconds since 1970."""
    values: dict[str, float]
    """Numbers by name. What is not a number at this step is left out."""


class RefusedError(Exception):
    """A tracker raises it if its store answers but will never accept this record or file. It is not sent again."""


class Tracker(Protocol):
    """Where a copy of a run's history goes. The constructor is `Name(run: TrackedRun, **options)`.

    The constructor checks the options and imports what the tracker needs. It does not connect. It raises `InputError`
    if a package is missing or an option is wrong.
    """

    run_id: str | None
    """The store's name for the run, known after `open`. Checkpoints keep it, so that a resume continues the run."""
    last_step: int
    """The last step in the store, known after `open`; 0 if there is none. Only later steps are sent.

    After a resume every line of metrics.jsonl is a candidate again, in case the store lacks some."""

    def open(self) -> None:
        """Connect to the store; create the run, or continue `run.run_id`. Called again if it raises.

        The start of a training waits for the first call, up to 20 s.

        Raises:
            InputError: an address, an account or an option is wrong. If it is raised during this wait, the training
                does not start.
        """
        ...

    def log_step(self, record: StepRecord) -> None:
        """Store the numbers of one step. Called in the order of the steps."""
        ...

    def log_artifact(self, path: Path, folder: str) -> None:
        """Store a file or a folder, under `folder` among the run's artifacts ("" for the top)."""
        ...

    def close(self, status: Status) -> None:
        """Write what is buffered and end the run. The last call."""
        ...


# --- Optional capabilities ------------------------------------------------------------------------------------------


@runtime_checkable
class LogsBatches(Protocol):
    """A tracker that sends several steps in one call. The background thread calls it instead of `log_step`."""

    def log_steps(self, records: Sequence[StepRecord]) -> int:
        """Store the first of these steps, at least one, and return how many.

        Raises:
            RefusedError: one of them is refused. The first is then sent with `log_step`.
        """
        ...


@runtime_checkable
class SetsStatus(Protocol):
    """A tracker whose store shows a run's status. Called after the last step and before the last files.

    Without it, a slow upload that is abandoned would leave a finished run marked as running.
    """

    def set_status(self, status: Status, time: float) -> None:
        """Mark the run as ended at `time`, in seconds since 1970."""
        ...


@runtime_checkable
class AttachesFiles(Protocol):
    """A tracker that can add files to a run that has ended. `distmeta evaluate --figures` asks for it."""

    def attach_files(self, paths: Sequence[Path], folder: str) -> None:
        """Add files to the artifacts of the run `run.run_id`, and leave its status as it is.

        `open` is not called, and of `run` only `run_id` and `report` are known.
        """
        ...


@runtime_checkable
class GroupsRuns(Protocol):
    """A tracker that shows runs under a parent. A sweep has a run in its store, and the trials' runs are under that.

    `distmeta sweep` calls these methods without `open`. They may raise if the store does not answer.
    """

    def child_options(self, parent_id: str) -> Mapping[str, Any]:
        """Return the options that a tracker of a run under this parent needs."""
        ...

    def running_children(self, parent_id: str) -> set[str]:
        """Return the ids of the runs under this parent that are marked as running."""
        ...

    def tag_runs(self, tags: Mapping[str, Mapping[str, str]]) -> None:
        """Set tags of runs: texts by name, by run id."""
        ...


@runtime_checkable
class ReadsEnvironment(Protocol):
    """A tracker that is configured by environment variables. `distmeta sweep` and `submit` pass them on.

    They ask the class; no tracker is built for this.
    """

    environment_prefixes: tuple[str, ...]
    """Beginnings of the variables' names."""


@runtime_checkable
class KeepsLocalStore(Protocol):
    """A tracker whose store is a file, unless a variable names another store. `distmeta submit` asks the class.

    The submitted job runs on another machine, in a working folder that is deleted afterwards.
    """

    @staticmethod
    def is_local(variable: str, value: str) -> bool:
        """Return whether a variable names a file of this machine. It is not passed on."""
        ...

    @staticmethod
    def default_store(folder: str) -> tuple[str, str]:
        """Return the variable, and its value, that put the store into a folder. A variable that is set stays."""
        ...
