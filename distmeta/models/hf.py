"""Networks of Hugging Face's transformers, from a folder, a package or a configuration."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from distmeta.errors import InputError, first_line
from distmeta.files import find_model_files
from distmeta.models.adapters import add_adapters

Task = Literal["classification", "regression", "token-classification", "features"]
Pooling = Literal["mean", "first", "last"]


class HuggingFace(nn.Module):
    """A transformer's last hidden states, pooled over the tokens, and a linear head.

    The input is what the network's own `forward` takes: a dict, for example `input_ids` and `attention_mask` [N, L], or
    one tensor (images as `pixel_values` [N, C, H, W], or token numbers). The output is [N, out_features]; per token,
    [N, L, out_features], for `token-classification`.

    A network with trained weights is in evaluation mode, so its dropout does nothing (`model.train_mode`).

    Args:
        name: a folder with a network's files; `package:PACKAGE/FOLDER`, a folder in an installed Python package; or a
            name on the hub, which needs a network or a filled cache.
        config: instead of a name, the configuration of a network with random weights: `{model_type: bert,
            hidden_size: 64, …}`.
        task: `classification` and `regression` have a linear head on the pooled states, `token-classification` one on
            every token's; `features` has none (for prototypical networks and other metric methods).
        pooling: `mean` over the tokens that the attention mask keeps, as sentence encoders do; `first` token, as BERT;
            or `last` kept token, as causal language models.
        peft: `{lora: {r: 8, …}}` freezes the network and trains LoRA weights in it (`models.adapters`).
        freeze_network: train only the head.

    Raises:
        InputError: transformers is not installed, or there is no such network.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_features: int,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        task: Task = "classification",
        pooling: Pooling = "mean",
        peft: dict[str, Any] | None = None,
        freeze_network: bool = False,
    ):
        super().__init__()
        self.network = load_network(name, config)
        self.pooling: Pooling = pooling
        self.is_per_token = task == "token-classification"
        unused = dict(self.network.named_children()).get("pooler")
        if unused is not None:
            unused.requires_grad_(False)  # it would get no gradient
        if peft is not None:
            add_adapters(self.network, peft)
        elif freeze_network:
            self.network.requires_grad_(False)
        if task != "features":
            self.head = nn.Linear(self.network.config.hidden_size, out_features)

    def forward(self, x: Any) -> Tensor:
        inputs = x if isinstance(x, dict) else {self.network.main_input_name: x}
        states_NLF = self.network(**inputs).last_hidden_state
        if not self.is_per_token:
            states_NLF = pool(states_NLF, inputs.get("attention_mask"), self.pooling)
        return self.head(states_NLF) if "head" in self._modules else states_NLF


def pool(states_NLF: Tensor, mask_NL: Tensor | None, how: Pooling) -> Tensor:
    """Return one vector for each example, [N, F], from the states of the tokens that the mask keeps."""
    if how == "first":
        return states_NLF[:, 0]
    if mask_NL is None:
        return states_NLF.mean(1) if how == "mean" else states_NLF[:, -1]
    mask_NL1 = mask_NL[..., None].to(states_NLF.dtype)
    if how == "mean":
        return (states_NLF * mask_NL1).sum(1) / mask_NL1.sum(1).clamp(min=1)
    positions = torch.arange(mask_NL.shape[1], device=mask_NL.device)
    last_N = (positions * mask_NL).argmax(1)
    return states_NLF.gather(1, last_N[:, None, None].expand(-1, 1, states_NLF.shape[2]))[:, 0]


def load_network(name: str | None, config: dict[str, Any] | None) -> Any:
    """Return the network of a name or of a configuration."""
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise InputError(
            f"model.type: got hf, which needs a package that is missing ({first_line(error)}): "
            "pip install 'distmeta[hf]'"
        ) from None
    if (name is None) == (config is None):
        raise InputError("model.name: expected a name or a config, and not both")
    try:
        if name is not None:
            return AutoModel.from_pretrained(find_model_files("model.name", name))
        options = dict(config or {})
        return AutoModel.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    except KeyError:
        raise InputError(
            "model.config.model_type: missing, expected a kind of network, for example bert"
        ) from None
    except (OSError, ValueError, ImportError) as error:
        field = "model.config" if name is None else f"model.name: got {name!r}"
        raise InputError(f"{field}: {first_line(error)}") from None
