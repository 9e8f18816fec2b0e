"""The outer optimizer: one of torch's, over theta as a flat vector, with a learning rate for each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, NamedTuple

import torch

from distmeta.compute.vectors import Layout
from distmeta.config.parts import import_part
from distmeta.config.sections import OuterSection
from distmeta.errors import InputError, first_line
from distmeta.protocols import Theta

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}
AVERAGE = "average"
"""The quantity that holds the moving average of theta (`outer.ema`)."""
STEP_COUNT = "step"
"""The quantity that torch's optimizers keep once per parameter. All others they keep per element."""


class Segment(NamedTuple):
    """Neighbouring tensors of theta with the same rate. The optimizer sees one parameter, since it is elementwise."""

    layout: Layout
    parameter: torch.nn.Parameter
    start: int
    stop: int
    """Elements [start, stop) of the flat vector."""


def build_segments(
    flat: torch.Tensor, layout: Layout, outer: OuterSection
) -> tuple[torch.optim.Optimizer, list[Segment]]:
    """Build the optimizer of a flat theta, with one parameter group per rate, and its segments in theta's order."""
    rates = find_rates(layout.names, outer)
    segments: list[Segment] = []
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for rate, members in groupby(range(len(rates)), rates.__getitem__):
        indices = list(members)
        names = tuple(layout.names[i] for i in indices)
        shapes = tuple(layout.shapes[i] for i in indices)
        part = Layout(names, shapes)
        start = layout.places[indices[0]][0]
        stop = start + part.size
        parameter = torch.nn.Parameter(flat[start:stop])
        segments.append(Segment(part, parameter, start, stop))
        groups.setdefault(rate, []).append(parameter)
    return build_optimizer(list(groups.items()), outer), segments


def find_rates(names: tuple[str, ...], outer: OuterSection) -> list[float]:
    """Return the rate of each tensor: that of the first glob in `outer.rates` that matches, else `outer.lr`.

    Raises:
        InputError: a glob matches nothing.
    """
    rates = []
    unused = set(outer.rates)
    for name in names:
        glob = next((glob for glob in outer.rates if fnmatchcase(name, glob)), None)
        if glob is None:
            rates.append(outer.lr)
            continue
        unused.discard(glob)
        rates.append(outer.rates[glob])
    if unused:
        raise InputError(
            f"outer.rates: {sorted(unused)[0]!r} matches nothing of theta; known: {', '.join(names)}"
        )
    return rates


def build_optimizer(
    groups: list[tuple[float, list[torch.nn.Parameter]]], outer: OuterSection
) -> torch.optim.Optimizer:
    """Build the optimizer for groups of parameters, each with its rate.

    It is neither fused nor foreach, because their bits depend on how parameters are grouped.
    """
    options = {
        key: getattr(outer, key)
        for key in ("momentum", "nesterov", "betas", "eps", "weight_decay")
        if getattr(outer, key) is not None
    }
    parameters = [{"params": parameters, "lr": rate} for rate, parameters in groups]
    if ":" in outer.optimizer:
        optimizer = _build_own_optimizer(parameters, outer)
    else:
        optimizer = OPTIMIZERS[outer.optimizer](parameters, lr=outer.lr, foreach=False, **options)
    if outer.ema is not None:
        _add_average(optimizer, outer.ema)
    return optimizer


def _build_own_optimizer(parameters: list[dict[str, Any]], outer: OuterSection) -> torch.optim.Optimizer:
    """Build a user's optimizer.

    Raises:
        InputError: it cannot be imported, is no optimizer, or refuses an option.
    """
    build = import_part("outer.optimizer", outer.optimizer, {})
    try:
        optimizer = build(parameters, lr=outer.lr, **outer.options)
    except (TypeError, ValueError) as error:
        raise InputError(f"outer.options: {outer.optimizer} refuses them ({first_line(error)})") from None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"outer.optimizer: got {outer.optimizer!r}, which builds {type(optimizer).__name__}, expected a "
            "torch.optim.Optimizer"
        )
    return optimizer


def _add_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Let an optimizer keep an exponential moving average of its parameters.

        ē_1 = θ_1,   ē_t = d ē_{t−1} + (1 − d) θ_t

    It is one more quantity of the optimizer's state, so every strategy cuts, saves and restores it like the others.
    """

    def update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if AVERAGE in state:
                    state[AVERAGE].lerp_(parameter.detach(), 1 - decay)
                else:
                    state[AVERAGE] = parameter.detach().clone()

    optimizer.register_step_post_hook(update)


def select_average(theta: Theta, tensors: Mapping[str, torch.Tensor]) -> Theta:
    """Return the moving average of theta from the optimizer's state; theta itself before the first step."""
    return {name: tensors.get(f"{name}/{AVERAGE}", value) for name, value in theta.items()}


def join_quantity(layout: Layout, quantity: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a segment's quantity from those of its tensors, `<parameter>/<quantity>`."""
    if quantity == STEP_COUNT:
        return tensors[f"{layout.names[0]}/{quantity}"]
    parts = {name: tensors[f"{name}/{quantity}"] for name in layout.names}
    return torch.from_numpy(layout.flatten(parts))


# --- Checkpoints: the files may come from anybody -----------------------------------------------------------------


def check_theta(theta: Theta, expected: Theta) -> None:
    """Raise `InputError` if a checkpoint's theta has other names or shapes than the job's."""
    found_shapes = {name: tuple(value.shape) for name, value in theta.items()}
    expected_shapes = {name: tuple(value.shape) for name, value in expected.items()}
    if found_shapes != expected_shapes:
        raise InputError(
            "checkpoint: its theta has other names or shapes than this job's model and algorithm"
        )


def check_state(tensors: Mapping[str, torch.Tensor], theta: Theta) -> None:
    """Raise `InputError` if the optimizer state cannot be that of a run with this theta."""
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        expected_shape = () if quantity == STEP_COUNT or name not in theta else theta[name].shape
        if name not in theta or value.shape != expected_shape:
            raise InputError(f"checkpoint: its optimizer state {key!r} does not match anything in theta")
        missing = next((other for other in theta if f"{other}/{quantity}" not in tensors), None)
        if missing is not None:
            raise InputError(f"checkpoint: its optimizer state has {key!r}, but nothing for {missing!r}")


def read_clock(plain: Any) -> int:
    """Return the number of steps on the schedule's clock, or raise `InputError` if the checkpoint has none."""
    clock = plain.get("clock") if isinstance(plain, dict) else None
    if type(clock) is not int or not 0 <= clock < 2**63:
        raise InputError(
            f"checkpoint: got {clock!r} as the clock of its outer rates, expected a number of steps"
        )
    return clock
