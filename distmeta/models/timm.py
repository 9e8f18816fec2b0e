"""Image networks of the library timm."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from distmeta.errors import InputError, did_you_mean, first_line
from distmeta.models.adapters import add_adapters

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def timm(
    in_shape: tuple[int, ...],
    out_features: int,
    name: str,
    batch_norm: Literal["batch", "fixed"] = "batch",
    peft: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Build an image network of timm with random weights; x [N, C, H, W] -> [N, out_features].

    Trained weights come from a file: `model.init_from`. Its head may have another number of outputs.

    Args:
        name: a network of timm, for example `resnet18` or `vit_tiny_patch16_224`.
        batch_norm: running statistics would carry data from one task to the next. `batch`: use those of the batch at
            hand. `fixed`: use the stored ones, for networks with trained weights.
        peft: `{lora: {r: 8, target_modules: [qkv], …}}` freezes the network and trains LoRA weights in it
            (`models.adapters`); the head stays trainable.
        options: further arguments of `timm.create_model`.

    Raises:
        InputError: timm is not installed, there is no such network, or the inputs are not images.
    """
    try:
        from timm.models import (  # pyright: ignore[reportMissingImports]
            create_model,
            is_model,
            list_models,
        )
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        raise InputError(
            f"model.type: got timm, which cannot be imported ({first_line(error)}): pip install 'distmeta[timm]', with "
            "a torchvision that was built for this torch"
        ) from None
    if len(in_shape) != 3:
        raise InputError(f"model.type: got timm for inputs of shape {in_shape}, expected images (C, H, W)")
    if not is_model(name):
        raise InputError(
            f"model.name: got {name!r}, expected a network of timm; {did_you_mean(name, list_models())}"
        )
    try:
        network = create_model(name, num_classes=out_features, in_chans=in_shape[0], **(options or {}))
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"model.options: {first_line(error)}") from None
    head = str(network.pretrained_cfg["classifier"])
    if peft is not None:
        add_adapters(network, peft)
        network.get_submodule(head).requires_grad_(True)
    for layer in network.modules():
        if isinstance(layer, NORMS):
            set_statistics(layer, batch_norm)
    network.head_module = head
    return network


def set_statistics(layer: Any, batch_norm: Literal["batch", "fixed"]) -> None:
    """Let a batch norm use the batch at hand, or its stored statistics."""
    if batch_norm == "fixed":
        layer.eval()
        return
    layer.track_running_stats = False
    layer.running_mean = None
    layer.running_var = None
    layer.num_batches_tracked = None
