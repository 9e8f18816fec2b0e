"""How a sweep shows its trials: the interface of a view, and the callback that passes Tune's events to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ray import tune

from distmeta.sweeps.trial import STEP, failure_path, trial_name


class View(Protocol):
    """Shows how a sweep goes."""

    def begin(self, folder: Path, count: int) -> None:
        """The search starts. `count`: the number of trials."""
        ...

    def trial(self, name: str, status: str, values: Mapping[str, Any], last: Mapping[str, Any], /) -> None:
        """A trial is running, done or failed.

        Args:
            values: its values of the searched keys.
            last: `metric`, `value` and `step` of its last evaluation; each is None before the first.
        """
        ...

    def report(self, text: str) -> None:
        """Show a line."""
        ...

    def end(self) -> None:
        """The search has ended. May be called twice."""
        ...


class SilentView:
    """A view that shows nothing."""

    def begin(self, folder: Path, count: int) -> None: ...
    def trial(self, name: str, status: str, values: Mapping[str, Any], last: Mapping[str, Any]) -> None: ...
    def report(self, text: str) -> None: ...
    def end(self) -> None: ...


class ViewCallback(tune.Callback):
    """Passes Tune's events to a view.

    Tune pickles its callbacks with its own state. A view cannot be pickled, so it is an attribute of the class.
    """

    view: ClassVar[View] = SilentView()

    def __init__(self, folder: str):
        self.folder = folder

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trial, "running", trial.last_result)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._show(trial, "running", result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        has_failed = failure_path(self.folder, trial_name(trial.trial_id)).exists()
        self._show(trial, "failed" if has_failed else "done", trial.last_result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trial, "failed", trial.last_result)

    def _show(self, trial: Any, status: str, result: dict[str, Any] | None) -> None:
        report = result or {}
        last = {key: report.get(key) for key in ("metric", "value", STEP)}
        self.view.trial(trial_name(trial.trial_id), status, trial.config["values"], last)
