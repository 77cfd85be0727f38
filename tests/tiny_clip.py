"""A tiny CLIP with weights made from their names, and pictures of objects: what the colours' fixture was run on."""

import json
import math
import zlib

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

from original_mask2former import pictures

_LETTERS = "abcdefghijklmnopqrstuvwxyz-"
START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), START, END]
NAMES = ("dog", "traffic light", "dog", "skis")
"""Class of each object of `objects`."""


def config():
    shared = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(TOKENS) - 2, "eos_token_id": len(TOKENS) - 1, "pad_token_id": len(TOKENS) - 1}
    return CLIPConfig(
        text_config={**shared, **ends, "vocab_size": len(TOKENS), "max_position_embeddings": 77},
        vision_config={**shared, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )


def model():
    """The same weights wherever they are made; large enough that colours differ."""
    made = CLIPModel(config()).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(parameter.shape))
            if parameter.dim() < 2:
                values = values * 0.1 + ("norm" in name and name.endswith("weight"))
            elif "embedding" not in name:
                values = values * 2 / math.sqrt(np.prod(parameter.shape[1:]))
            parameter.copy_(torch.tensor(values, dtype=torch.float32))
    return made


def save(folder):
    """Write a folder in transformers' layout. The tokenizer knows letters only."""
    model().save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": END, "model_max_length": 77}))
    return folder


def objects():
    """Pictures, and for each a box and the mask of an ellipse within it: one object for each of `NAMES`."""
    made = pictures()
    found = []
    for picture, place in zip(
        (made[0], made[1], made[2], made[1]), ((4, 6, 40, 30), (20, 3, 75, 58), (0, 0, 57, 100), (0, 0, 21, 61))
    ):
        x1, y1, x2, y2 = place
        y, x = np.mgrid[: picture.height, : picture.width] + 0.5
        mask = ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1
        found.append((picture, place, mask))
    return found
