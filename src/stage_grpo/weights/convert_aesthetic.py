"""LAION's aesthetic predictor v2: its linear layers into a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from stage_grpo.weights.convert_clip import need_file, read_tensors

FILE = "sac+logos+ava1-l14-linearMSE.pth"


def convert(source_files: dict[str, Path], out: Path) -> None:
    """Writes the predictor's layers as ``model.safetensors``.

    Args:
        source_files: ``sac+logos+ava1-l14-linearMSE.pth``.
        out: Folder that exists.

    Raises:
        ValueError: the file is missing, broken, or no chain of linear layers.
    """
    file = need_file(source_files, FILE)
    layers = as_layers(read_tensors(file), "", str(file))
    save_layers(layers, out / "model.safetensors")
    num_inputs = next(iter(layers.values())).shape[1]
    config = {"model_type": "linear_layers", "num_inputs": num_inputs, "features": "clip-vit-large-patch14"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def as_layers(state: dict[str, Tensor], prefix: str, origin: str) -> dict[str, Tensor]:
    """The tensors ``layers.N.weight`` and ``layers.N.bias`` in the order of N.

    Args:
        state: Tensors by name.
        prefix: What stands before ``layers`` in their names.
        origin: Where they come from, for error messages.

    Raises:
        ValueError: there are none, a weight has no bias, or a name is another.
    """
    named = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    places = sorted(
        {name.split(".")[1] for name in named if name.count(".") == 2}, key=lambda place: (len(place), place)
    )
    wanted = [f"layers.{place}.{kind}" for place in places for kind in ("weight", "bias")]
    if not places or set(wanted) != set(named) or not all(place.isdigit() for place in places):
        raise ValueError(f"{origin} holds {', '.join(sorted(named)) or 'no layers'}, no linear layers; get it again")
    return {name: named[name] for name in wanted}


def save_layers(layers: dict[str, Tensor], file: Path) -> None:
    """Writes layers in float32."""
    from safetensors.torch import save_file

    save_file({name: tensor.float().contiguous() for name, tensor in layers.items()}, file)
