"""Random weights under mmdet's names and pictures, made from seeds: what the fixtures of the detector were run on.

``mask2former_names.json.gz`` holds names and shapes of every tensor of mmdet's own model, in the key styles of mmdet
2.x and 3.x, for the benchmark's architecture and for a tiny one; ``mask2former_parity.npz`` what mmdet made of the
tiny one with the weights that `weight` makes from their names (``docs/rewards.md`` says how).
"""

import gzip
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from stage_grpo.weights import convert_mask2former

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = ((48, 48), (90, 61), (57, 100))
"""Width and height of each picture of `pictures`."""
_UNSCALED = ("query_embed", "query_feat", "level_embed", "level_encoding", "relative_position_bias_table")
_GAIN = {"cls_embed.weight": 6.0, "mask_embed.4.weight": 6.0}
_MASK_OFFSET = 8.0


def names(style, size):
    """Shapes by name: ``style`` is "2.x" or "3.x", ``size`` "full" or "tiny"."""
    return json.loads(gzip.decompress((FIXTURES / "mask2former_names.json.gz").read_bytes()))[size][style]


def weight(name, shape):
    """The same numbers wherever they are made: NumPy's legacy generator is frozen, and its seed is the name.

    The first channel of the mask features is the constant 1 and that of the queries a negative number, so that
    masks cover a part of the picture and their boxes mean something.
    """
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        is_norm = "norm" in name or ".gn." in name
        values = values * 0.1 + (is_norm and name.endswith("weight"))
    elif not name.endswith(tuple(f"{part}{end}" for part in _UNSCALED for end in ("", ".weight"))):
        values = values / math.sqrt(np.prod(shape[1:]))
    values *= next((gain for end, gain in _GAIN.items() if name.endswith(end)), 1.0)
    if ".mask_feature." in name:
        values[0] = float(name.endswith("bias"))
    if ".mask_embed.4." in name:
        values[0] = -_MASK_OFFSET * name.endswith("bias")
    return torch.from_numpy(values.astype(np.float32))


def weights(style="2.x"):
    """Tensors of the tiny model under mmdet's names, without the index buffers that mmdet saves beside them."""
    return {
        name: weight(name, shape)
        for name, shape in names(style, "tiny").items()
        if not name.endswith("relative_position_index")
    }


def converted(style, folder, **arguments):
    """Folder made by the converter from the tiny model under one style of names."""
    file = folder / "model.pth"
    saved = {"meta": {"CLASSES": ("a",), "epoch": 1}, "state_dict": weights(style)}
    torch.save(saved, file, **arguments)
    (folder / "out").mkdir()
    convert_mask2former.convert({"model.pth": file}, folder / "out")
    return folder / "out"


def pictures():
    """Pictures of `SIZES`: noise with coloured rectangles and ellipses on it."""
    made = []
    for seed, (width, height) in enumerate(SIZES):
        random = np.random.RandomState(seed)
        noise = random.randint(0, 80, (height, width, 3)) + random.randint(0, 175, 3)
        picture = Image.fromarray(noise.astype(np.uint8), "RGB")
        draw = ImageDraw.Draw(picture)
        for index in range(4):
            x, y = random.randint(0, width - 12), random.randint(0, height - 12)
            corners = (x, y, x + random.randint(8, width // 2), y + random.randint(8, height // 2))
            (draw.rectangle, draw.ellipse)[index % 2]([int(c) for c in corners], fill=tuple(random.randint(0, 256, 3)))
        made.append(picture)
    return made
