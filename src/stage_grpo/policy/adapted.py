"""Linear layers with PEFT's low-rank adapters (LoRA), for a decoding step that reads weights and calls no module.

The adapter stays a product of its own. Merged into a bfloat16 weight, updates as small as those of the first steps
would be rounded away, and the images would not be the trained policy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from stage_grpo.policy.packed import LinearFunction, linear_function


def is_adapted(layer: Any) -> bool:
    """Whether a layer is PEFT's LoRA around a linear one."""
    return type(layer) is lora.Linear


def base_layer(layer: Any) -> nn.Linear:
    """The linear layer itself."""
    return layer.base_layer if is_adapted(layer) else layer


def why_not_adapted(layer: Any) -> str | None:
    """Say why a layer with adapters computes something else than :func:`adapters_function` says, or return None."""
    if layer.lora_variant:
        return f"its adapters are no plain LoRA but {', '.join(type(v).__name__ for v in layer.lora_variant.values())}"
    if layer.merged and layer.disable_adapters:
        return "its adapters are disabled while they are merged"
    if any(up.bias is not None for up in layer.lora_B.values()):
        return "its adapters have a bias"
    return None


def adapters_function(layers: Sequence[Any], dtype: torch.dtype | None = None) -> LinearFunction | None:
    """What the adapters of linear layers that share their input add to the joined outputs, or None for none.

    Args:
        layers: Linear layers, with or without adapters.
        dtype: Dtype to compute in, autocast's; None: the adapters' own.
    """
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for layer in layers:
        names = _active(layer)
        downs += [layer.lora_A[name].weight.detach() for name in names]
        scaled = [layer.lora_B[name].weight.detach() * layer.scaling[name] for name in names]
        rows = base_layer(layer).out_features
        ups.append(torch.cat(scaled, dim=1) if names else base_layer(layer).weight.new_empty(rows, 0))
    if not downs:
        return None
    dtype = dtype or downs[0].dtype
    down = linear_function(torch.cat(downs).to(dtype))
    up = linear_function(torch.block_diag(*(part.to(dtype) for part in ups)))
    return lambda x: up(down(x.to(dtype)))


def _active(layer: Any) -> list[str]:
    if not is_adapted(layer) or layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]
