"""ImageReward's checkpoint into transformers' BLIP: an image model, a text model, and the linear layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage_grpo.weights.convert_aesthetic import as_layers, save_layers
from stage_grpo.weights.convert_clip import copy_others, fill, need_file, read_tensors

FILE, MED_CONFIG = "ImageReward.pt", "med_config.json"
VISION_HEADS = 16
"""Attention heads of ViT-L/16, which no tensor's shape tells."""
VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
POSITIONS = "embeddings.position_ids"
"""A counter from 0 that the checkpoint stores and transformers makes itself."""

_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_BLOCK_PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def convert(source_files: dict[str, Path], out: Path) -> None:
    """Writes ``vision/``, ``text/`` and ``head.safetensors``, beside the files of BERT's tokenizer.

    The two projections of BLIP's pretraining, which the score does not use, are left out.

    Args:
        source_files: ``ImageReward.pt``, ``med_config.json`` and the tokenizer's files.
        out: Folder that exists.

    Raises:
        ValueError: a file is missing, broken, or not what its name says.
    """
    file = need_file(source_files, FILE)
    state = read_tensors(file)
    config = _read_config(need_file(source_files, MED_CONFIG))
    layers = as_layers(_part(state, HEAD), "", str(file))
    try:
        models = {"vision": _vision(_part(state, VISION), str(file)), "text": _text(state, config, str(file))}
    except (KeyError, IndexError) as error:
        raise ValueError(f"{file} lacks {error}; it is no checkpoint of ImageReward, get it again") from error
    for name, model in models.items():
        model.save_pretrained(out / name)
    save_layers(layers, out / "head.safetensors")
    copy_others(source_files, out, {FILE, MED_CONFIG})


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, ValueError, TypeError) as error:
        raise ValueError(f"{file} is no JSON object ({error}); get it again") from error


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _vision(state: dict[str, Tensor], origin: str) -> Any:
    from transformers import BlipVisionModel

    config = vision_config(state, VISION_HEADS)
    with torch.device("meta"):
        model = BlipVisionModel(config)
    fill(model, {vision_name(name): tensor for name, tensor in state.items()}, origin)
    return model


def vision_config(state: dict[str, Tensor], num_heads: int) -> Any:
    """Config of BLIP's image model, read off its tensors.

    Args:
        state: Tensors under the original's names.
        num_heads: Attention heads, which no shape tells.

    Raises:
        KeyError: a tensor is missing.
    """
    from transformers import BlipVisionConfig

    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_attention_heads=num_heads,
        image_size=round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )


def vision_name(name: str) -> str:
    """A name in transformers' layout; one that is not known stays, and is reported when the model is filled."""
    if name in _VISION_NAMES:
        return _VISION_NAMES[name]
    owner, _, kind = name.rpartition(".")
    if owner in _VISION_NAMES:
        return f"{_VISION_NAMES[owner]}.{kind}"
    first, _, rest = owner.partition(".")
    index, _, part = rest.partition(".")
    if first == "blocks" and part in _BLOCK_PARTS:
        return f"encoder.layers.{index}.{_BLOCK_PARTS[part]}.{kind}"
    return name


def _text(state: dict[str, Tensor], med: dict[str, Any], origin: str) -> Any:
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    tensors = {name: tensor for name, tensor in _part(state, TEXT).items() if name != POSITIONS}
    config = BlipTextConfig(
        vocab_size=tensors["embeddings.word_embeddings.weight"].shape[0],
        hidden_size=med["hidden_size"],
        intermediate_size=med["intermediate_size"],
        num_hidden_layers=med["num_hidden_layers"],
        num_attention_heads=med["num_attention_heads"],
        max_position_embeddings=med["max_position_embeddings"],
        hidden_act=med["hidden_act"],
        layer_norm_eps=med["layer_norm_eps"],
        pad_token_id=med["pad_token_id"],
        encoder_hidden_size=state[f"{VISION}pos_embed"].shape[-1],
        is_decoder=True,  # gives the layers that look at the image; they are not causal
    )
    with torch.device("meta"):
        model = BlipTextModel(config, add_pooling_layer=False)
    fill(model, tensors, origin)
    return model
