"""Loading the model of a reward: whole, complete, frozen."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from stage_grpo.onednn_linear import onednn_pays, use_onednn
from stage_grpo.rewards.whole_models import whole_models

_LOADING = threading.Lock()
"""transformers changes settings of the whole process while it loads, and rewards may load in threads."""


def load_model(model_class: Any, folder: Path, device: str, dtype: str, **arguments: Any) -> Any:
    """A model of ``transformers`` from a folder, ready to judge and never trained.

    Args:
        model_class: Class whose ``from_pretrained`` reads it.
        folder: In transformers' layout.
        device: Where it goes.
        dtype: Of its weights.
        **arguments: Of the class's constructor.

    Raises:
        ValueError: The folder lacks weights, which would otherwise be drawn at random.
    """
    with _LOADING, whole_models():
        model, report = model_class.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True, **arguments
        )
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if wrong:
        raise ValueError(
            f"{folder} lacks {len(wrong)} weights of {model_class.__name__}, such as {wrong[0]}; get them again"
        )
    if torch.device(device).type == "cpu" and onednn_pays():
        use_onednn(model)
    return model.eval().requires_grad_(False).to(device)


def load_head(file: Path, num_inputs: int, device: str) -> torch.nn.Sequential:
    """Linear layers in float32, one after the other without activations, that end in one number.

    Args:
        file: safetensors of ``layers.N.weight`` and ``layers.N.bias``, applied in the order of N.
        num_inputs: Features that come in.
        device: Where it goes.

    Raises:
        ValueError: The layers do not fit to one another, or to what comes in or goes out.
    """
    from safetensors.torch import load_file

    tensors = load_file(file)
    places = sorted({int(name.split(".")[1]) for name in tensors})
    widths = [num_inputs]
    layers = []
    for place in places:
        weight, bias = tensors[f"layers.{place}.weight"].float(), tensors[f"layers.{place}.bias"].float()
        layers.append(torch.nn.Linear(weight.shape[1], weight.shape[0], device="meta"))
        layers[-1].load_state_dict({"weight": weight, "bias": bias}, assign=True)
        if weight.shape[1] != widths[-1]:
            break
        widths.append(weight.shape[0])
    if len(widths) != len(places) + 1 or widths[-1] != 1:
        raise ValueError(f"{file} does not lead from {num_inputs} features to one score; get it again")
    return torch.nn.Sequential(*layers).eval().requires_grad_(False).to(device)
