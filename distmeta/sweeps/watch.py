"""Tune's events, handed to whoever watches the sweep."""

from __future__ import annotations

from typing import Any, ClassVar

from ray import tune

from distmeta.sweeps.trial import STEP, failure_file, name_of


class Watch(tune.Callback):
    """A callback that Tune pickles with its own state: the view stays with the process, on the class."""

    view: ClassVar[Any] = None

    def __init__(self, folder: str):
        self.folder = folder

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, "running", trial.last_result)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._tell(trial, "running", result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        failed = failure_file(self.folder, name_of(trial.trial_id)).exists()
        self._tell(trial, "failed" if failed else "done", trial.last_result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, "failed", trial.last_result)

    def _tell(self, trial: Any, status: str, result: dict[str, Any] | None) -> None:
        figures = {key: (result or {}).get(key) for key in ("metric", "value", STEP)}
        self.view.trial(name_of(trial.trial_id), status, trial.config["values"], figures)
