"""A small GroundingDINO in IDEA's format, whose weights are made from their names, and a tiny BERT tokenizer.

``gdino_parity.npz`` holds what IDEA's own code gives for these weights, pictures and captions; ``gdino_names.json.gz``
names and shapes of its tensors, small and true; ``gdino_legacy.json.gz`` what T2I-R1's scoring functions give for
random boxes. docs/rewards.md says how they were run.
"""

import gzip
import json
import re
import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BertTokenizer, GroundingDinoImageProcessorPil

from original_janus import weight
from stage_grpo.weights.convert_gdino import convert

FIXTURES = Path(__file__).parent / "fixtures"
WORDS = ["yes", "no", "red", "apple", "cup", "stop", "sign", "dog", "tv", "remote", "control", "ice", "cream", "cone"]
WORDS += ["a", "zebra", "bus", "bench", "left"]
SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
CASES = [
    (0, (60, 60), ["red apple", "cup"]),
    (1, (60, 60), ["stop sign"]),
    (2, (90, 50), ["dog", "ice cream cone", "tv"]),
    (3, (40, 80), ["remote control", "zebra", "bench", "quux"]),
]
"""Seed and size of a picture, and what is looked for in it."""


def names(kind):
    """Names and shapes of the ``tiny`` or ``true`` network's tensors."""
    return json.loads(gzip.decompress((FIXTURES / "gdino_names.json.gz").read_bytes()))[kind]


def tensors():
    """The small network under IDEA's names. Its box head stands there under many."""
    made = {}
    for name, shape in names("tiny").items():
        source = re.sub(r"^(transformer\.decoder\.)?bbox_embed\.\d+", "bbox_embed.0", name)
        # The factor and the other name keep token logits and boxes from saturating.
        made[name] = weight(source.replace("bbox_embed", "bbox_head"), shape)
        made[name] *= 0.1 if "text_layers.1.norm2" in name else 1.0
    return made


def picture(seed, size):
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def write_tokenizer(folder):
    """A BERT tokenizer of 1,100 entries, with [CLS], [SEP], full stop and question mark where BERT has them."""
    letters = list(string.ascii_lowercase)
    words = dict.fromkeys([*WORDS, *letters, *(f"##{letter}" for letter in letters), "-"])
    entries = [f"[unused{index}]" for index in range(1100)]
    entries[104 : 104 + len(words)] = words
    for index, word in SPECIAL.items():
        entries[index] = word
    BertTokenizer(vocab={word: index for index, word in enumerate(entries)}).save_pretrained(folder)


def write_converted(folder):
    """The folder that the conversion makes of the small network, with pictures of 96 pixels instead of 800."""
    source, out = folder / "source", folder / "converted"
    source.mkdir()
    out.mkdir()
    write_tokenizer(source)
    state = {f"module.{name}": tensor for name, tensor in tensors().items()}
    torch.save({"model": state}, source / "groundingdino_swint_ogc.pth")
    convert({path.name: path for path in source.iterdir()}, out)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(out)
    return out
