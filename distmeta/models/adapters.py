"""Small trainable weights inside a large frozen network (the library `peft`)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from distmeta.errors import InputError, did_you_mean, first_line

LORA_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
"""Our names of options, and peft's."""


def add_adapters(network: nn.Module, peft: Mapping[str, Any]) -> None:
    """Freeze a network and add LoRA weights to some of its linear layers, in place.

    A layer W x becomes W x + (α / r) B A x, with A [r, in] and B [out, r] trainable and B = 0 at the start.

    Reference: Hu et al. 2021, arXiv 2106.09685, §4.1.

    Args:
        peft: `{"lora": {"r": 8, "alpha": 16, "target_modules": ["query", "value"]}}`. All options of
            `peft.LoraConfig` may be given; without target_modules, peft chooses them by the kind of network.

    Raises:
        InputError: peft is not installed, an option is unknown, or no layer matches.
    """
    if set(peft) != {"lora"} or not isinstance(peft["lora"], Mapping):
        raise InputError(f"model.peft: got {dict(peft)!r}, expected {{lora: {{r: 8, …}}}}")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError(
            f"model.peft: it needs a package that is missing ({first_line(error)}): pip install 'distmeta[hf]'"
        ) from None
    options: dict[str, Any] = {}
    for name, value in peft["lora"].items():
        options[LORA_NAMES.get(str(name), str(name))] = value
    known = list(LoraConfig.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise InputError(f"model.peft.lora.{name}: unknown key; {did_you_mean(name, known)}")
    network.requires_grad_(False)
    try:
        with warnings.catch_warnings():
            # GPT-2's layers store W transposed. peft 0.21 corrects the option itself, and says so at every build.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
            inject_adapter_in_model(LoraConfig(**options), network)
    except (ValueError, TypeError) as error:
        raise InputError(f"model.peft.lora: {first_line(error)}") from None
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name)
