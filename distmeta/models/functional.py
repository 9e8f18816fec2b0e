"""A `torch.nn.Module` as a pure function of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distmeta.errors import InputError, did_you_mean
from distmeta.protocols import Theta, one_hot, select_prefix, to_float32

PREFIX = "model."

HeadInit = Literal["linear", "shared", "prototype"]


class Functional:
    """model(phi, x): the module's outputs under the parameters `phi` (keys `model.<parameter>`).

    Trainable parameters are `phi`'s; frozen ones and buffers are *constants*: they are not in theta, are sent to
    a worker once, and are saved beside theta in a checkpoint.

    The module's *head* is its submodule `head` where that is a linear layer, else its last linear layer with
    `out_features` outputs; what enters it are the *features*. A module without one is an embedding: its outputs are
    its features.

    Args:
        build: makes the module.
        generator: seeds the module's own initialisation.
        freeze: glob over parameter names; what it matches is frozen.
        init_from: safetensors file of (some of) the module's parameters and buffers.
        head: how a task's head starts (`begin`). `linear`: as theta has it, with a fixed number of ways. `shared`:
            theta holds one row, copied to each of the task's classes, whose value a softmax does not see, so that
            what is learned is the body (UnicornMAML: Ye & Chao 2022, arXiv 2106.16245,
            §6).
            `prototype`: from the support set, w_c = 2 p_c and b_c = −‖p_c‖² with p_c the mean of the features of
            class c (ProtoMAML: Triantafillou et al. 2020, arXiv 1903.03096, §3); theta holds none.
        out_features: outputs that the tasks ask for; by it the head is found.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        generator: torch.Generator,
        freeze: str | None = None,
        init_from: str | None = None,
        head: HeadInit = "linear",
        out_features: int | None = None,
    ):
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the CPU alone: no other is put back
            self.module = build()
        if not isinstance(self.module, nn.Module):
            raise InputError(f"model.type: got {type(self.module).__name__}, expected a torch.nn.Module")
        parameters = dict(self.module.named_parameters())
        if init_from is not None:
            _load(self.module, init_from)
        frozen = {name for name in parameters if freeze is not None and fnmatchcase(name, freeze)}
        frozen |= {name for name, value in parameters.items() if not value.requires_grad}
        if freeze is not None and not frozen:
            raise InputError(
                f"model.freeze: got {freeze!r}, which matches no parameter; {did_you_mean(freeze, list(parameters))}"
            )
        self.head_init: HeadInit = head
        self.head = _find_head(self.module, out_features)
        """Keys of the head in theta: (weight,) or (weight, bias); empty where there is none."""
        if head != "linear" and (not self.head or {n.removeprefix(PREFIX) for n in self.head} & frozen):
            raise InputError(
                f"model.head: got {head}, but {type(self.module).__name__} has no trainable linear head"
            )
        self._initial = {n: p.detach().clone() for n, p in parameters.items() if n not in frozen}
        self.constants: dict[str, Tensor] = {n: parameters[n].detach() for n in sorted(frozen)}
        self.constants |= {n: b.detach() for n, b in self.module.named_buffers()}
        self._tied = _shares_tensors(self.module)
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in self.module.modules())

    @property
    def adaptable(self) -> tuple[str, ...]:
        """The keys of phi: what an inner loop may move."""
        return tuple(PREFIX + name for name in self._initial)

    def init(self, generator: torch.Generator | None = None) -> Theta:
        """The trainable parameters at the start. The module drew them itself; `generator` is not used."""
        theta = {PREFIX + name: value.clone() for name, value in self._initial.items()}
        if self.head_init == "shared":
            return theta | {name: theta[name][:1] for name in self.head}
        return self._body(theta) if self.head_init == "prototype" else theta

    def init_body(self) -> Theta:
        """`init` without the head: for methods that work on the features."""
        if self.head_init != "linear":
            raise InputError(
                f"model.head: got {self.head_init} for a method without a linear head: leave it out"
            )
        return self._body(self.init())

    def begin(self, theta: Mapping[str, Tensor], support: Any = None, ways: int | None = None) -> Theta:
        """phi before the first inner step: theta's `model.*`, with a head for this task's number of ways.

        Raises:
            InputError: a `shared` or `prototype` head for tasks without classes.
        """
        phi = select_prefix(theta, PREFIX)
        if self.head_init == "linear":
            return phi
        if ways is None:
            raise InputError(f"model.head: got {self.head_init} for tasks without classes, expected linear")
        if self.head_init == "shared":
            return phi | {name: theta[name].expand(ways, *theta[name].shape[1:]) for name in self.head}
        features_NF = self.features(phi, support.x)
        classes_NW = one_hot(support.y, ways, features_NF.dtype)
        prototypes_WF = classes_NW.T @ features_NF / classes_NW.sum(0).clamp(min=1)[:, None]
        rows = (2 * prototypes_WF, -prototypes_WF.square().sum(1))
        return phi | dict(zip(self.head, rows, strict=False))

    def __call__(self, phi: Mapping[str, Tensor], x: Tensor) -> Tensor:
        values = dict(self.constants)
        for name, value in select_prefix(phi, PREFIX).items():
            values[name.removeprefix(PREFIX)] = value
        with no_cudnn() if self._recurrent else nullcontext():
            return to_float32(torch.func.functional_call(self.module, values, (x,), tie_weights=self._tied))

    def features(self, phi: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """What enters the head, [N, F]; phi need not have the head's entries."""
        if not self.head:
            return self(phi, x).flatten(1)
        entered: list[Tensor] = []
        head = self.module.get_submodule(self.head[0].removeprefix(PREFIX).rpartition(".")[0])
        hook = head.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        try:
            self(phi, x)
        finally:
            hook.remove()
        return to_float32(entered[-1])

    def _body(self, theta: Theta) -> Theta:
        return {name: value for name, value in theta.items() if name not in self.head}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Functional:
        """Moves the constants (and the module's own copies); floating-point ones change their dtype."""
        self.module.to(device=device, dtype=dtype)

        def move(value: Tensor) -> Tensor:
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        self.constants = {name: move(value) for name, value in self.constants.items()}
        self._initial = {name: move(value) for name, value in self._initial.items()}
        return self


@contextmanager
def no_cudnn() -> Iterator[None]:
    """cuDNN's recurrent layers have no second derivative, and in evaluation none at all."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _shares_tensors(module: nn.Module) -> bool:
    """Whether a parameter or buffer has two names; functional_call looks for such at every call, unless told not to."""
    both = (module.named_parameters, module.named_buffers)
    return any(len(list(named())) < len(list(named(remove_duplicate=False))) for named in both)


def _find_head(module: nn.Module, out_features: int | None) -> tuple[str, ...]:
    """Keys of the head's weight and bias."""
    linear = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    fitting = [name for name, m in linear.items() if m.out_features == out_features]
    name = "head" if "head" in linear else fitting[-1] if fitting else None
    if name is None:
        return ()
    keys = ("weight", "bias") if linear[name].bias is not None else ("weight",)
    return tuple(f"{PREFIX}{name}.{key}" if name else PREFIX + key for key in keys)


def _load(module: nn.Module, path: str) -> None:
    """Copies the tensors of a safetensors file into the module, by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise InputError(f"model.init_from: got {path!r}, expected an existing safetensors file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"model.init_from: {path!r} is not a readable safetensors file: {error}") from None
    tensors = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, value in tensors.items():
        if name not in own:
            raise InputError(
                f"model.init_from: tensor {name!r} is not in the model; {did_you_mean(name, list(own))}"
            )
        if value.shape != own[name].shape:
            raise InputError(
                f"model.init_from: tensor {name!r} has shape {list(value.shape)}, "
                f"expected {list(own[name].shape)}"
            )
        with torch.no_grad():
            own[name].copy_(value)
