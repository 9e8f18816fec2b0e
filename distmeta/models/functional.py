"""A `torch.nn.Module` as a pure function of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from distmeta.compute.gradient import to_float32
from distmeta.compute.precision import bfloat16_device, compute_in_bfloat16
from distmeta.errors import InputError
from distmeta.models.head import HeadInit, build_prototype_head, find_head
from distmeta.models.module import (
    Glob,
    TrainMode,
    build_seeded,
    check_trainable,
    find_frozen,
    has_tied_tensors,
    prepare_module,
)
from distmeta.models.pretrained import load_weights
from distmeta.protocols import Theta
from distmeta.trees import tree_map_only

PREFIX = "model."
NEEDS_GRAD_MODE = "does not require grad"
"""What torch says of a derivative in a forward pass without grad mode."""
USES_HOOKS = "the model uses activation checkpointing"


class FunctionalModel:
    """model(phi, x): the module's outputs under the parameters `phi`, with keys `model.<parameter>`.

    Trainable parameters are in phi. Frozen parameters and buffers are *constants*: they are not in theta, are sent to
    a worker once, and are stored beside theta in a checkpoint.

    The *head* is the last layer (`models.head.find_head`). The inputs of the head are the *features*. If there is no
    head, the module is an embedding, and its outputs are the features.

    Args:
        build: makes the module.
        generator: seeds the module's own initialisation.
        freeze: glob over parameter names. Matching parameters are frozen.
        init_from: file or run folder with some of the module's parameters and buffers (`models.pretrained`).
        init_prefix, init_strict: how its names fit (`models.pretrained.load_weights`).
        train_mode: `keep` or `train` (`models.module.prepare_module`).
        head: how a task's head starts. `linear`: as in theta, with a fixed number of ways. `shared`: theta has one row,
            which is copied for each class of the task; a softmax does not depend on its value, so only the body is
            learned (UnicornMAML: Ye & Chao 2022, arXiv 2106.16245, §6). `prototype`: from the support set; theta has
            none (ProtoMAML: Triantafillou et al. 2020, arXiv 1903.03096, §3).
        head_module: name of the submodule that is the head; None: it is found by `out_features`.
        out_features: outputs that the tasks need.
        make_inputs: makes one task's inputs, with which lazy layers find their sizes.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        generator: torch.Generator,
        freeze: Glob | None = None,
        init_from: str | None = None,
        init_prefix: str | None = None,
        init_strict: bool = False,
        train_mode: TrainMode = "keep",
        head: HeadInit = "linear",
        head_module: str | None = None,
        out_features: int | None = None,
        make_inputs: Callable[[], Any] | None = None,
    ):
        self.module = build_seeded(build, generator, make_inputs)
        self.notes = prepare_module(self.module, train_mode)
        """What a user should know of how the model starts, a line each."""
        parameters = dict(self.module.named_parameters())
        if init_from is not None:
            self.notes.append(str(load_weights(self.module, init_from, init_prefix, init_strict)))
        frozen = find_frozen(parameters, freeze)
        check_trainable(self.module, {n: p for n, p in parameters.items() if n not in frozen})
        self.head_init: HeadInit = head
        self._head = find_head(self.module, out_features, head_module)
        if head != "linear" and (not self.linear_head or set(self._head.parameters) & frozen):
            raise InputError(
                f"model.head: got {head}, but {type(self.module).__name__} has no trainable linear head, expected "
                "linear"
            )
        self._initial = {n: p.detach().clone() for n, p in parameters.items() if n not in frozen}
        self.constants: dict[str, Tensor] = {n: parameters[n].detach() for n in sorted(frozen)}
        self.constants |= {n: b.detach() for n, b in self.module.named_buffers()}
        self._has_tied_tensors = has_tied_tensors(self.module)
        self._differentiates = False
        """Whether the module takes a derivative in its forward pass (`torch.autograd.grad`)."""
        self._recomputes = False
        """Whether the module uses hooks on saved tensors (activation checkpointing)."""
        self._is_recurrent = any(isinstance(layer, nn.RNNBase) for layer in self.module.modules())

    @property
    def head(self) -> tuple[str, ...]:
        """Keys of the head's parameters in theta; empty if there is no head.

        Raises:
            InputError: it is not certain which layer is the head.
        """
        if self._head.doubt is not None:
            raise InputError(f"model.head_module: {self._head.doubt}")
        return tuple(PREFIX + name for name in self._head.parameters)

    @property
    def linear_head(self) -> tuple[str, ...]:
        """The same for a head that is a plain linear layer: (weight,) or (weight, bias).

        Raises:
            InputError: the head is something else, for example a linear layer with weight norm.
        """
        keys = self.head
        if keys and not self._head.is_linear:
            raise InputError(
                f"model.head_module: got {self._head.module!r} of {type(self.module).__name__}, expected a plain "
                "linear layer (without weight norm, pruning or tied weights): this method computes its weight"
            )
        return keys

    @property
    def adaptable(self) -> tuple[str, ...]:
        """The keys of phi: what an inner loop may change."""
        return tuple(PREFIX + name for name in self._initial)

    def init(self, generator: torch.Generator | None = None) -> Theta:
        """Return the trainable parameters at step 0. The module drew them when it was built."""
        theta = {PREFIX + name: value.clone() for name, value in self._initial.items()}
        if self.head_init == "shared":
            return theta | {name: theta[name][:1] for name in self.head}
        return self._without_head(theta) if self.head_init == "prototype" else theta

    def init_body(self) -> Theta:
        """Return the trainable parameters at step 0 without those of the head, for methods that use features."""
        if self.head_init != "linear":
            raise InputError(
                f"model.head: got {self.head_init} for a method without a linear head, expected no such key"
            )
        return self._without_head(self.init())

    def begin(self, theta: Mapping[str, Tensor], support: Any = None, ways: int | None = None) -> Theta:
        """Return phi before the first inner step, with a head for `ways` classes.

        Raises:
            InputError: a `shared` or `prototype` head for tasks without classes.
        """
        phi = {name: value for name, value in theta.items() if name.startswith(PREFIX)}
        if self.head_init == "linear":
            return phi
        if ways is None:
            raise InputError(f"model.head: got {self.head_init} for tasks without classes, expected linear")
        if self.head_init == "shared":
            return phi | {name: theta[name].expand(ways, *theta[name].shape[1:]) for name in self.head}
        weight_and_bias = build_prototype_head(self.features(phi, support.x), support.y, ways)
        return phi | dict(zip(self.linear_head, weight_and_bias, strict=False))

    def features(self, phi: Mapping[str, Tensor], x: Any) -> Tensor:
        """Return the inputs of the head, [N, F]. `phi` does not need the head's parameters.

        Raises:
            InputError: the forward pass does not call the head.
        """
        if not self.head:
            return self(phi, x).flatten(1)
        head = self.module.get_submodule(str(self._head.module))
        inputs_of_head: list[Tensor] = []
        hook = head.register_forward_pre_hook(
            lambda _, args, named: inputs_of_head.append([*args, *named.values()][0]), with_kwargs=True
        )
        try:
            self(phi, x)
        finally:
            hook.remove()
        if not inputs_of_head:
            raise InputError(
                f"model.head_module: {self._head.module!r} of {type(self.module).__name__} is not called in the "
                "forward pass, expected self.head(features): this method uses the features"
            )
        return to_float32(inputs_of_head[-1])

    def __call__(self, phi: Mapping[str, Tensor], x: Any) -> Any:
        values = dict(self.constants)
        for name, value in phi.items():
            if name.startswith(PREFIX):
                values[name.removeprefix(PREFIX)] = value
        device = bfloat16_device.get()
        if device is None:
            return self._call_module(values, x)
        head_weight = values.get(self._head.parameters[0]) if self._head.is_linear else None
        with compute_in_bfloat16(device, head_weight):
            outputs = self._call_module(values, x)
        return to_float32(outputs)

    def _call_module(self, values: dict[str, Tensor], x: Any) -> Any:
        """Run the module, in grad mode if its forward pass takes a derivative."""
        if not self._differentiates or torch.is_grad_enabled():
            try:
                return self._call_module_as_it_is(values, x)
            except RuntimeError as error:
                if torch.is_grad_enabled() or NEEDS_GRAD_MODE not in str(error):
                    raise
                self._differentiates = True
        with torch.enable_grad():
            outputs = self._call_module_as_it_is(values, x)
        return tree_map_only(Tensor, Tensor.detach, outputs)

    def _call_module_as_it_is(self, values: dict[str, Tensor], x: Any) -> Any:
        with disable_cudnn() if self._is_recurrent else nullcontext():
            if not self._recomputes:
                try:
                    with torch.autograd.graph.disable_saved_tensors_hooks(USES_HOOKS):
                        return torch.func.functional_call(
                            self.module, values, (x,), tie_weights=self._has_tied_tensors
                        )
                except RuntimeError as error:
                    if USES_HOOKS not in str(error):
                        raise
                    self._recomputes = True
            return self._copy_module(values)(x)

    def _copy_module(self, values: Mapping[str, Tensor]) -> nn.Module:
        """Return a copy of the module with these tensors in place of its parameters and buffers.

        A checkpoint computes activations again during the backward pass, with the tensors that the module has then.
        `functional_call` has put the module's own ones back by that time, and the gradient would be another one.
        """
        named = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        replaced = {id(tensor): values[name] for name, tensor in named.items() if name in values}
        return copy.deepcopy(self.module, replaced)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> FunctionalModel:
        """Move the constants and the module. Floating-point tensors are also cast to `dtype`."""
        self.module.to(device=device, dtype=dtype)

        def move(value: Tensor) -> Tensor:
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        self.constants = {name: move(value) for name, value in self.constants.items()}
        self._initial = {name: move(value) for name, value in self._initial.items()}
        return self

    def _without_head(self, theta: Theta) -> Theta:
        return {name: value for name, value in theta.items() if name not in self.head}


@contextmanager
def disable_cudnn() -> Iterator[None]:
    """Disable cuDNN, whose recurrent layers have no second derivative, and in evaluation mode no derivative at all."""
    was_enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = was_enabled
