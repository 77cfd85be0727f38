"""The tiny checkpoint in DeepSeek's format that the tests of the conversion work on.

Three fixtures come from DeepSeek's own code (``docs/checkpoints.md`` says how): names and shapes of the full
Janus-Pro-1B and -7B; and, for a tiny model whose weights `weight` makes from their names, the outputs of every path,
the ids of its tokenizer and the text of its conversation template.
"""

import gzip
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from stage_grpo.checkpoints.shards import read_tensors, weight_files

FIXTURES = Path(__file__).parent / "fixtures"
KEPT = "original_only.safetensors"
HF_CODEBOOK = "model.vqmodel.quantize.embedding.weight"


def fixture_of(name):
    return json.loads(gzip.decompress((FIXTURES / f"janus_{name}.json.gz").read_bytes()))


def weight(name, shape):
    """The same numbers wherever they are made: NumPy's legacy generator is frozen, and its seed is the name."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        values = values * 0.1 + ("norm" in name and name.endswith("weight"))
    elif "embed" not in name:
        values = values / math.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


def tiny_weights():
    return {name: weight(name, shape) for name, shape in fixture_of("tiny")["tensors"].items()}


def write_original(folder, weights, config=None, files=None):
    """Write the tiny checkpoint; entries of the config and whole files may be replaced, a file of None is left out."""
    fixture = fixture_of("tiny")
    folder.mkdir()
    contents = {"config.json": fixture["config"] | (config or {}), **fixture["files"], **(files or {})}
    for file, content in contents.items():
        if content is not None:
            (folder / file).write_text(json.dumps(content))
    save_file(weights, folder / "model.safetensors")
    return folder


def write_as_bin(folder, tensors, num_files):
    """Replace the weights of a folder by pytorch files, with neighbours in different files."""
    (folder / "model.safetensors").unlink()
    cuts = [list(tensors)[i::num_files] for i in range(num_files)]
    files = {f"pytorch_model-{i + 1:05d}-of-{num_files:05d}.bin": cut for i, cut in enumerate(cuts)}
    for file, cut in files.items():
        torch.save({name: tensors[name] for name in cut}, folder / file)
    weight_map = {name: file for file, cut in files.items() for name in cut}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def copy_folder(source, target, without=()):
    target.mkdir()
    for file in source.iterdir():
        if file.name not in without:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def everything(folder):
    """All tensors of a checkpoint by name."""
    return {name: tensor for file in weight_files(folder) for name, tensor in read_tensors(file)}
