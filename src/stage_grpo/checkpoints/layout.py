"""What a whole checkpoint consists of: every tensor with its shape, in both formats, for given sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional

from stage_grpo.checkpoints import names
from stage_grpo.checkpoints.errors import need

Shape = tuple[int, ...]
ATTENTION_POOL = "vision_model.vision_tower.attn_pool."
CODES_USED = "gen_vision_model.quantize.codebook_used"
ROTARY = ".self_attn.rotary_emb.inv_freq"
_CODES_USED_SHAPE = (65536,)
_UNIT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Layout:
    """Names and shapes of one model in both formats."""

    transformers: dict[str, Shape]
    """Tensors of transformers' format."""
    original: dict[str, Shape]
    """Tensors of the original format that have a counterpart."""
    original_only: dict[str, Shape]
    """Tensors of the original format that no computation reads: the vision tower's pooling head, a usage count."""
    optional: frozenset[str]
    """Names, of either format, that may be missing: a text head tied to the text embedding."""

    def expected(self, original: bool) -> dict[str, Shape]:
        """All that a checkpoint of one format may and, but for the optional ones, must hold."""
        return self.original | self.original_only if original else self.transformers


def layout_of(config: Any) -> Layout:
    """Layout of a model, taken from transformers' own classes built without memory.

    Args:
        config: A ``JanusConfig``.

    Raises:
        ValueError: If transformers' model has a tensor for which the original format has no name.
    """
    from transformers import JanusForConditionalGeneration

    with torch.device("meta"):
        model = JanusForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    original: dict[str, Shape] = {}
    for name, shape in shapes.items():
        place = names.to_original(name)
        if place is None:
            raise ValueError(f"tensor {name!r} of transformers' Janus has no name in the original format")
        stored, _, parts = place
        original[stored] = (1, *shape) if stored == names.POSITIONS else (parts * shape[0], *shape[1:])
    tied = {"lm_head.weight", "language_model.lm_head.weight"} if config.tie_word_embeddings else set()
    return Layout(shapes, original, _original_only(config.vision_config), frozenset(tied))


def _original_only(vision: Any) -> dict[str, Shape]:
    width, inner = vision.hidden_size, int(vision.hidden_size * vision.mlp_ratio)
    linear = {"q": (width, width), "kv": (2 * width, width), "proj": (width, width)}
    linear |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    shapes: dict[str, Shape] = {CODES_USED: _CODES_USED_SHAPE, ATTENTION_POOL + "latent": (1, 1, width)}
    shapes |= {f"{ATTENTION_POOL}norm.{part}": (width,) for part in ("weight", "bias")}
    shapes |= {f"{ATTENTION_POOL}{name}.weight": shape for name, shape in linear.items()}
    return shapes | {f"{ATTENTION_POOL}{name}.bias": shape[:1] for name, shape in linear.items()}


def is_rotary_table(name: str) -> bool:
    """Whether a name is a table of rotary frequencies, which old files may hold and every model recomputes."""
    return name.startswith("language_model.model.layers.") and name.endswith(ROTARY)


def check_tensor(name: str, tensor: Shaped[Tensor, "*shape"], expected: dict[str, Shape], file: str) -> None:
    """Check that a tensor belongs to the model and has its shape.

    Raises:
        ValueError: If not; the message names tensor and file.
    """
    need(name in expected, f"{file}: tensor {name!r} has no place in the model that config.json describes")
    need(
        tuple(tensor.shape) == expected[name],
        f"{file}: tensor {name!r} has shape {tuple(tensor.shape)}, but config.json makes it {expected[name]}",
    )


def unit_codebook(rows: Float[Tensor, "V D"]) -> Float[Tensor, "V D"]:
    """The codebook as transformers' encoder needs it: rows of length one.

    DeepSeek's code normalises the rows whenever it uses them. Transformers' does so for decoding only, and picks other
    codes when it encodes with rows of another length. Rows that change are kept in float32: rounding unit rows to
    bfloat16 would turn them by up to 0.2 %, and images with them.

    Args:
        rows: Codebook of the original format.

    Returns:
        The very same tensor if all rows have length one within 1e-6, else unit rows in float32.
    """
    wide = rows.float()
    if bool(((wide.norm(dim=-1) - 1).abs() <= _UNIT_TOLERANCE).all()):
        return rows
    return functional.normalize(wide, dim=-1)
