"""A judge in LLaVA-NeXT's layout, such as ``CaraJ/ORM-T2I-R1``, as a folder in transformers' layout.

Names change, numbers do not. The shards are read and written one after the other.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipImageProcessorPil, SiglipVisionConfig

VISION_HEAD_SIZE = 72
"""Of SigLIP so400m: 1152 / 16."""

_VISION = "model.vision_tower.vision_tower.vision_model."
_RENAMES = (
    (_VISION, "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.layers.", "language_model.model.layers."),
    ("model.norm.", "language_model.model.norm."),
)
_NEEDED = (
    f"{_VISION}embeddings.patch_embedding.weight",
    f"{_VISION}encoder.layers.0.mlp.fc1.weight",
    "model.mm_projector.0.weight",
    "model.image_newline",
    "model.embed_tokens.weight",
)
_TEXT_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)


def convert(source_files: Mapping[str, Path], out: Path) -> None:
    """Writes a folder in transformers' layout.

    Args:
        source_files: ``config.json``, the ``.safetensors`` shards, and the files of the tokenizer, by name.
        out: An empty folder.

    Raises:
        ValueError: Files are missing, or hold something else than a LLaVA with SigLIP and Qwen2.
    """
    shards = {name: path for name, path in source_files.items() if name.endswith(".safetensors")}
    if "config.json" not in source_files or not shards:
        raise ValueError(f"found {sorted(source_files)}; give config.json, the .safetensors files and the tokenizer")
    shapes: dict[str, tuple[int, ...]] = {}
    index: dict[str, str] = {}
    for name, path in shards.items():
        tensors = dict(_read(path, shapes))
        index |= dict.fromkeys(tensors, name)
        save_file(tensors, out / name, metadata={"format": "pt"})
    if list(shards) != ["model.safetensors"]:
        content = json.dumps({"metadata": {}, "weight_map": index}, indent=2)
        (out / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    config = read_config(json.loads(source_files["config.json"].read_text(encoding="utf-8")), shapes)
    config.save_pretrained(out)
    side = config.vision_config.image_size  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    half = [0.5, 0.5, 0.5]
    processor = SiglipImageProcessorPil(size={"height": side, "width": side}, image_mean=half, image_std=half)
    processor.save_pretrained(out)
    for name, path in source_files.items():
        if name not in shards and name != "config.json" and not name.endswith(".index.json"):
            shutil.copyfile(path, out / name)


def new_name(name: str) -> str:
    """A tensor's name in transformers' files.

    Args:
        name: Its name in LLaVA-NeXT's.

    Raises:
        ValueError: It is none of a LLaVA's.
    """
    for old, new in _RENAMES:
        if name.startswith(old):
            return new + name[len(old) :]
    raise ValueError(f"the tensor {name!r} is none of a LLaVA-OneVision; give the files of CaraJ/ORM-T2I-R1")


def read_config(llava: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> LlavaOnevisionConfig:
    """The architecture: of the language model as ``config.json`` says, of the image encoder from its shapes.

    Args:
        llava: LLaVA-NeXT's ``config.json``.
        shapes: Of all tensors, by LLaVA-NeXT's names.

    Raises:
        ValueError: Tensors or keys are missing.
    """
    lacking = [name for name in _NEEDED if name not in shapes]
    lacking += [key for key in _TEXT_KEYS if key not in llava]
    side = re.search(r"(\d+)$", str(llava.get("mm_vision_tower")))
    if lacking or side is None:
        lacking += [] if side else ["the picture's size at the end of mm_vision_tower"]
        raise ValueError(f"there is no {', '.join(lacking)}; give the files of CaraJ/ORM-T2I-R1")
    hidden, _, _, patch = shapes[f"{_VISION}embeddings.patch_embedding.weight"]
    layers = {m[1] for m in (re.match(rf"{re.escape(_VISION)}encoder\.layers\.(\d+)\.", name) for name in shapes) if m}
    vision = SiglipVisionConfig(
        hidden_size=hidden,
        intermediate_size=shapes[f"{_VISION}encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, hidden // VISION_HEAD_SIZE),
        image_size=int(side[1]),
        patch_size=patch,
        vision_use_head=False,  # pyright: ignore[reportCallIssue]
    )
    tied = "lm_head.weight" not in shapes
    text = Qwen2Config(
        **{key: llava[key] for key in _TEXT_KEYS},
        vocab_size=shapes["model.embed_tokens.weight"][0],
        tie_word_embeddings=tied,
    )
    return LlavaOnevisionConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied)


def _read(path: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one shard under their new names; fills ``shapes`` by the old ones."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            # LLaVA-NeXT leaves the encoder's own head out; some files still carry it.
            if name.startswith(f"{_VISION}head."):
                continue
            tensor = file.get_tensor(name)
            shapes[name] = tuple(tensor.shape)
            yield new_name(name), tensor
