"""BLIP's checkpoint for visual question answering into transformers' ``BlipForQuestionAnswering``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage_grpo.weights.convert_clip import copy_others, fill, need_file, read_tensors
from stage_grpo.weights.convert_image_reward import POSITIONS, vision_config, vision_name

FILE = "model_base_vqa_capfilt_large.pth"
HEADS = 12
"""Attention heads of ViT-B/16 and of BERT base, which no tensor's shape tells."""
_VISION, _READER, _ANSWERER = "visual_encoder.", "text_encoder.", "text_decoder."
_WORDS = f"{_ANSWERER}bert.embeddings.word_embeddings.weight"
_LAST = f"{_ANSWERER}cls.predictions."
"""The last layer shares its weight with the words' embeddings, and its bias with a tensor beside it."""


def convert(source_files: dict[str, Path], out: Path) -> None:
    """Writes a ``BlipForQuestionAnswering``, beside the files of BERT's tokenizer.

    Tensors outside the model's three parts are left out, as the benchmark's own loader leaves them.

    Args:
        source_files: ``model_base_vqa_capfilt_large.pth`` and the tokenizer's files.
        out: Folder that exists.

    Raises:
        ValueError: a file is missing, broken, or not what its name says.
    """
    from transformers import BlipForQuestionAnswering

    file = need_file(source_files, FILE)
    state = read_tensors(file).get("model")
    if not isinstance(state, dict):
        raise ValueError(f"{file} has no 'model'; it is no checkpoint of BLIP, get it again")
    try:
        config, tensors = _config(state), _renamed(state)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{file} lacks {error}; it is no checkpoint of BLIP's question answering") from error
    with torch.device("meta"):
        model = BlipForQuestionAnswering(config)
    fill(model, tensors, str(file))
    model.tie_weights()
    model.save_pretrained(out)
    copy_others(source_files, out, {FILE})


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The three parts under transformers' names."""
    tensors = {}
    for name, tensor in state.items():
        if name.startswith(_VISION):
            tensors[f"vision_model.{vision_name(name.removeprefix(_VISION))}"] = tensor
        elif name.startswith((_READER, _ANSWERER)) and not name.endswith(POSITIONS):
            tensors[name] = tensor
    # Stored twice, or once: as the original, which keeps one tensor for both, the last layer's copy counts.
    tensors[_WORDS] = tensors[f"{_LAST}decoder.weight"] = tensors.get(f"{_LAST}decoder.weight", tensors[_WORDS])
    bias = tensors.get(f"{_LAST}decoder.bias", tensors[f"{_LAST}bias"])
    tensors[f"{_LAST}bias"] = tensors[f"{_LAST}decoder.bias"] = bias
    return tensors


def _config(state: dict[str, Tensor]) -> Any:
    from transformers import BlipConfig

    seen = {name.removeprefix(_VISION): tensor for name, tensor in state.items() if name.startswith(_VISION)}
    vision = vision_config(seen, HEADS)
    vocab_size, width = state[f"{_READER}embeddings.word_embeddings.weight"].shape
    layers = {name.split(".")[3] for name in state if name.startswith(f"{_READER}encoder.layer.")}
    text_config = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": state[f"{_READER}encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": HEADS,
        "max_position_embeddings": state[f"{_READER}embeddings.position_embeddings.weight"].shape[0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "encoder_hidden_size": vision.hidden_size,
        # The last two tokens are BLIP's own: [DEC] begins an answer, [ENC] a question.
        "bos_token_id": vocab_size - 2,
    }
    return BlipConfig(text_config=text_config, vision_config=vision.to_dict())
