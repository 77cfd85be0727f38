"""CLIP checkpoints under open_clip's names, such as HPSv2.1, into the layout of transformers' ``CLIPModel``."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HPS_FILE = "HPS_v2.1_compressed.pt"
PICKLED_FILE = "pytorch_model.bin"
HPS_HEADS = 16
"""Attention heads of both towers of ViT-H/14; the only numbers of the architecture that no tensor's shape tells."""

_WHOLE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
_TOWERS = {"transformer": "text_model", "visual.transformer": "vision_model"}
_LAYER_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def convert_hps(source_files: dict[str, Path], out: Path) -> None:
    """Writes HPSv2.1 as a ``CLIPModel``.

    Args:
        source_files: ``HPS_v2.1_compressed.pt``, and the tokenizer's and image processor's files of CLIP ViT-H/14.
        out: Folder that exists.

    Raises:
        ValueError: a file is missing, broken, or not what its name says.
    """
    file = need_file(source_files, HPS_FILE)
    content = read_tensors(file)
    if not isinstance(content.get("state_dict"), dict):
        raise ValueError(f"{file} has no 'state_dict'; it is no checkpoint of HPSv2, get it again")
    convert_open_clip(content["state_dict"], out, HPS_HEADS, HPS_HEADS, "gelu", str(file))
    copy_others(source_files, out, {HPS_FILE})


def convert_open_clip(
    state: dict[str, Tensor], out: Path, vision_heads: int, text_heads: int, hidden_act: str, origin: str
) -> None:
    """Writes a CLIP under open_clip's names as config and weights of a ``CLIPModel``, in its own precision.

    Args:
        state: Tensors by name.
        out: Folder that exists.
        vision_heads: Attention heads of the image's tower.
        text_heads: Attention heads of the text's tower.
        hidden_act: ``gelu``, or ``quick_gelu`` for OpenAI's weights.
        origin: Where the tensors come from, for error messages.

    Raises:
        ValueError: names or shapes are not those of a CLIP with vision transformer.
    """
    from transformers import CLIPModel

    renamed = dict(pair for name, tensor in state.items() for pair in _rename(name, tensor, origin))
    try:
        config = _config(state, vision_heads, text_heads, hidden_act)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{origin} is no CLIP with vision transformer ({error!r}); get it again") from error
    with torch.device("meta"):
        model = CLIPModel(config)
    fill(model, renamed, origin)
    model.save_pretrained(out)


def convert_pickled(source_files: dict[str, Path], out: Path) -> None:
    """Writes a ``CLIPModel``, whose weights come as ``pytorch_model.bin`` under its own names, as safetensors.

    Args:
        source_files: ``pytorch_model.bin``, ``config.json``, and the tokenizer's and image processor's files.
        out: Folder that exists.

    Raises:
        ValueError: a file is missing, broken, or not what its name says.
    """
    from transformers import CLIPConfig, CLIPModel

    file = need_file(source_files, PICKLED_FILE)
    config = CLIPConfig.from_pretrained(need_file(source_files, "config.json"))
    # Counters from 0, which older versions stored and today's make themselves.
    tensors = {name: tensor for name, tensor in read_tensors(file).items() if not name.endswith(".position_ids")}
    with torch.device("meta"):
        model = CLIPModel(config)
    fill(model, tensors, str(file))
    model.save_pretrained(out)
    copy_others(source_files, out, {PICKLED_FILE, "config.json"})


def _rename(name: str, tensor: Tensor, origin: str) -> list[tuple[str, Tensor]]:
    """Names and tensors in transformers' layout; a fused projection becomes three."""
    if name in _WHOLE:
        return [(_WHOLE[name], tensor)]
    if name in _TRANSPOSED:
        return [(_TRANSPOSED[name], tensor.T.contiguous())]
    owner, _, kind = name.rpartition(".")
    if owner in _NORMS:
        return [(f"{_NORMS[owner]}.{kind}", tensor)]
    tower, _, rest = name.partition(".resblocks.")
    index, _, part = rest.partition(".")
    if tower in _TOWERS and index.isdigit():
        layer = f"{_TOWERS[tower]}.encoder.layers.{index}"
        if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = part.rpartition("_")[2]
            split = tensor.chunk(3)
            return [(f"{layer}.self_attn.{q}_proj.{kind}", split[i].contiguous()) for i, q in enumerate("qkv")]
        owner, _, kind = part.rpartition(".")
        if owner in _LAYER_PARTS:
            return [(f"{layer}.{_LAYER_PARTS[owner]}.{kind}", tensor)]
    raise ValueError(f"{origin} holds {name!r}, which is no part of a CLIP with vision transformer; get it again")


def _config(state: dict[str, Tensor], vision_heads: int, text_heads: int, hidden_act: str) -> Any:
    from transformers import CLIPConfig

    vocab_size, text_width = state["token_embedding.weight"].shape
    vision_width, _, patch_size, _ = state["visual.conv1.weight"].shape
    num_patches = state["visual.positional_embedding"].shape[0] - 1
    embed_dim = state["text_projection"].shape[1]
    text_config = {
        "vocab_size": vocab_size,
        "hidden_size": text_width,
        "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _num_layers(state, "transformer."),
        "num_attention_heads": text_heads,
        "max_position_embeddings": state["positional_embedding"].shape[0],
        "hidden_act": hidden_act,
        "projection_dim": embed_dim,
        # The last two tokens of CLIP's vocabulary; padding is never looked at.
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }
    vision_config = {
        "hidden_size": vision_width,
        "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _num_layers(state, "visual.transformer."),
        "num_attention_heads": vision_heads,
        "image_size": round(num_patches**0.5) * patch_size,
        "patch_size": patch_size,
        "hidden_act": hidden_act,
        "projection_dim": embed_dim,
    }
    return CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=embed_dim)


def _num_layers(state: dict[str, Tensor], tower: str) -> int:
    return len({name.split(".resblocks.")[1].split(".")[0] for name in state if name.startswith(f"{tower}resblocks.")})


def read_tensors(file: Path) -> dict[str, Any]:
    """What ``torch.save`` wrote of tensors and plain values; nothing in the file is run.

    Args:
        file: Checkpoint, e.g. ``.pt`` or ``.pth``.

    Raises:
        ValueError: the file is broken, or holds anything but tensors and plain values by name.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        first = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{file} holds more than tensors, or is broken: {first}; get it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not tensors by name; get it again")
    return content


def fill(model: torch.nn.Module, tensors: dict[str, Tensor], origin: str) -> None:
    """Gives a model on the meta device its tensors.

    Raises:
        ValueError: one is missing, too many, or of another shape.
    """
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{origin} does not fill a {type(model).__name__}: {error}; get it again") from error


def need_file(source_files: dict[str, Path], name: str) -> Path:
    """A source file by name.

    Raises:
        ValueError: it is not among them.
    """
    if name not in source_files:
        raise ValueError(f"{name} is missing among {', '.join(sorted(source_files)) or 'no files'}; get it too")
    return source_files[name]


def copy_others(source_files: dict[str, Path], out: Path, without: Iterable[str]) -> None:
    """Copies the source files, such as those of a tokenizer, that need no conversion."""
    for name in source_files.keys() - set(without):
        shutil.copyfile(source_files[name], out / name)
