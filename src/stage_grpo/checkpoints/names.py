"""Which tensor of DeepSeek's format is which tensor of transformers' format.

One table serves both directions. ``#`` stands for a number; a template that ends in a dot stands for all parameters
below it. Almost every tensor is merely renamed; the attention of the vision tower, whose queries, keys and values
DeepSeek stores as one tensor, and its position table, which has a leading dimension of one, are reshaped.

Source: the module names of ``MultiModalityCausalLM`` in github.com/deepseek-ai/Janus and of
``JanusForConditionalGeneration`` in transformers.
"""

from __future__ import annotations

import re
from functools import cache

CODEBOOK = "gen_vision_model.quantize.embedding.weight"
"""The image codebook: see `stage_grpo.checkpoints.layout.unit_codebook`."""
POSITIONS = "vision_model.vision_tower.pos_embed"
QKV = ("q", "k", "v")
_MAX_ALIGNER_DEPTH = 8
_TOWER = "vision_model.vision_tower."
_TOWER_HF = "model.vision_model."


def _aligner(original: str, transformers: str) -> list[tuple[str, str]]:
    """An aligner is a sequence Linear, GELU, Linear, ...: layer 2 k of the original is hidden layer k - 1."""
    hidden = [
        (f"{original}.layers.{2 * k}.", f"{transformers}.hidden_layers.{k - 1}.") for k in range(1, _MAX_ALIGNER_DEPTH)
    ]
    return [(f"{original}.layers.0.", f"{transformers}.fc1."), *hidden]


def _image_codec(half: str, levels: str, resample: str) -> list[tuple[str, str]]:
    """Encoder or decoder of the VQ model."""
    original, transformers = f"gen_vision_model.{half}.", f"model.vqmodel.{half}."
    middle = [("mid.0.", "mid.block_1."), ("mid.1.", "mid.attn_1."), ("mid.2.", "mid.block_2.")]
    blocks = [
        ("conv_blocks.#.res.#.", f"{levels}.#.block.#."),
        ("conv_blocks.#.attn.#.", f"{levels}.#.attn.#."),
        (f"conv_blocks.#.{resample}.", f"{levels}.#.{resample}."),
    ]
    ends = [(name, name) for name in ("conv_in.", "norm_out.", "conv_out.")]
    return [(original + ours, transformers + theirs) for ours, theirs in [*ends, *middle, *blocks]]


RENAMED: list[tuple[str, str]] = [
    (_TOWER + "patch_embed.proj.", _TOWER_HF + "embeddings.patch_embedding."),
    (POSITIONS, _TOWER_HF + "embeddings.position_embedding.weight"),
    (_TOWER + "blocks.#.norm1.", _TOWER_HF + "encoder.layers.#.layer_norm1."),
    (_TOWER + "blocks.#.norm2.", _TOWER_HF + "encoder.layers.#.layer_norm2."),
    (_TOWER + "blocks.#.attn.proj.", _TOWER_HF + "encoder.layers.#.self_attn.projection_layer."),
    *[(_TOWER + f"blocks.#.attn.qkv.{part}.", _TOWER_HF + f"encoder.layers.#.self_attn.{part}_proj.") for part in QKV],
    (_TOWER + "blocks.#.mlp.", _TOWER_HF + "encoder.layers.#.mlp."),
    (_TOWER + "norm.", _TOWER_HF + "post_layernorm."),
    *_aligner("aligner", "model.aligner"),
    *_aligner("gen_aligner", "model.generation_aligner"),
    ("gen_embed.", "model.generation_embeddings."),
    ("gen_head.output_mlp_projector.", "model.generation_head.proj_out."),
    ("gen_head.vision_head.", "model.generation_head.vision_head."),
    *_image_codec("encoder", "down", "downsample"),
    *_image_codec("decoder", "up", "upsample"),
    ("gen_vision_model.quantize.embedding.", "model.vqmodel.quantize.embedding."),
    ("gen_vision_model.quant_conv.", "model.vqmodel.quant_conv."),
    ("gen_vision_model.post_quant_conv.", "model.vqmodel.post_quant_conv."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
]
"""Original template -> transformers template. The ``qkv.q``, ``qkv.k`` and ``qkv.v`` of the original are thirds of
the stored ``qkv``."""

_QKV_PART = re.compile(r"(?P<head>.*\.attn\.qkv)\.(?P<part>[qkv])\.(?P<tail>weight|bias)")
_QKV_WHOLE = re.compile(r"(?P<head>vision_model\..*\.attn\.qkv)\.(?P<tail>weight|bias)")


def to_transformers(name: str) -> list[str]:
    """Names in transformers' format of one stored tensor of the original format.

    Args:
        name: Name in DeepSeek's format.

    Returns:
        One name; three for a ``qkv`` tensor, whose thirds along the first dimension they are, in order; none for a
        name that no rule knows.
    """
    whole = _QKV_WHOLE.fullmatch(name)
    parts = [f"{whole['head']}.{part}.{whole['tail']}" for part in QKV] if whole else [name]
    renamed = [_rename(part, forward=True) for part in parts]
    return [new for new in renamed if new is not None]


def to_original(name: str) -> tuple[str, int, int] | None:
    """Where a tensor of transformers' format goes in the original format.

    Args:
        name: Name in transformers' format.

    Returns:
        Name of the stored tensor, index of this tensor among its equal parts along the first dimension, and the number
        of parts (1 for all but ``qkv``); None for a name that no rule knows.
    """
    renamed = _rename(name, forward=False)
    if renamed is None:
        return None
    part = _QKV_PART.fullmatch(renamed)
    if part is None:
        return renamed, 0, 1
    return f"{part['head']}.{part['tail']}", QKV.index(part["part"]), len(QKV)


def _rename(name: str, forward: bool) -> str | None:
    for pattern, replacement in _rules(forward):
        match = pattern.fullmatch(name)
        if match:
            *numbers, rest = match.groups()
            return replacement.replace("#", "{}").format(*numbers) + rest
    return None


@cache
def _rules(forward: bool) -> list[tuple[re.Pattern[str], str]]:
    return [_rule(*(pair if forward else reversed(pair))) for pair in RENAMED]


def _rule(old: str, new: str) -> tuple[re.Pattern[str], str]:
    rest = "(?P<rest>.+)" if old.endswith(".") else "(?P<rest>)"
    return re.compile(re.escape(old).replace(r"\#", r"(\d+)") + rest), new
