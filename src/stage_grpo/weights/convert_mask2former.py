"""mmdet's Mask2Former checkpoint with a Swin backbone -> transformers' layout.

The network is the same in both libraries; what differs are names, the projections of queries, keys and values that
mmdet stores in one tensor, and the order in which a patch merger reads its four pixels. Names of mmdet 2.x (the file
that GenEval downloads) and of mmdet 3.x are both known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from stage_grpo.prompt_sets.vocabulary import OBJECT_NAMES
from stage_grpo.weights.convert_clip import read_tensors

_NUM_POINTS = 4
"""Sampling points per head and level of the deformable attention; fixed in transformers."""

_TO_2X = (
    (r"(pixel_decoder\.encoder\.layers\.\d+)\.self_attn\.", r"\1.attentions.0."),
    (r"(transformer_decoder\.layers\.\d+)\.cross_attn\.", r"\1.attentions.0."),
    (r"(transformer_decoder\.layers\.\d+)\.self_attn\.", r"\1.attentions.1."),
    (r"(layers\.\d+)\.ffn\.layers\.", r"\1.ffns.0.layers."),
)
_SWIN = "model.pixel_level_module.encoder"
_PIXELS = "model.pixel_level_module.decoder"
_QUERIES = "model.transformer_module"
_LAYER = r"transformer_decoder\.layers\.(\d+)"
_RENAMES = (
    (r"backbone\.patch_embed\.projection", rf"{_SWIN}.swin.embeddings.patch_embeddings.projection"),
    (r"backbone\.patch_embed\.norm", rf"{_SWIN}.swin.embeddings.norm"),
    (r"backbone\.stages\.(\d+)\.downsample", rf"{_SWIN}.swin.encoder.layers.\1.downsample"),
    (r"backbone\.stages\.(\d+)\.blocks", rf"{_SWIN}.swin.encoder.layers.\1.blocks"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.w_msa\.proj\.", ".attention.o_proj."),
    (r"\.attn\.w_msa\.relative", ".attention.relative_position_bias.relative"),
    (r"\.attn\.w_msa\.", ".attention."),
    (r"(blocks\.\d+)\.ffn\.layers\.0\.0\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.ffn\.layers\.1\.", r"\1.mlp.fc2."),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv\.", rf"{_PIXELS}.input_projections.\1.0."),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn\.", rf"{_PIXELS}.input_projections.\1.1."),
    (r"panoptic_head\.pixel_decoder\.level_encoding\.weight", rf"{_PIXELS}.level_embed"),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv\.", rf"{_PIXELS}.adapter_1.0."),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn\.", rf"{_PIXELS}.adapter_1.1."),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv\.", rf"{_PIXELS}.layer_1.0."),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn\.", rf"{_PIXELS}.layer_1.1."),
    (r"panoptic_head\.pixel_decoder\.mask_feature\.", rf"{_PIXELS}.mask_projection."),
    (r"panoptic_head\.pixel_decoder\.encoder\.", rf"{_PIXELS}.encoder."),
    (rf"({re.escape(_PIXELS)}\.encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (rf"({re.escape(_PIXELS)}\.encoder\.layers\.\d+)\.norms\.0\.", r"\1.self_attn_layer_norm."),
    (rf"({re.escape(_PIXELS)}\.encoder\.layers\.\d+)\.norms\.1\.", r"\1.final_layer_norm."),
    (rf"panoptic_head\.{_LAYER}\.attentions\.0\.attn\.", rf"{_QUERIES}.decoder.layers.\1.cross_attn."),
    (rf"panoptic_head\.{_LAYER}\.attentions\.1\.attn\.", rf"{_QUERIES}.decoder.layers.\1.self_attn."),
    (rf"panoptic_head\.{_LAYER}\.norms\.0\.", rf"{_QUERIES}.decoder.layers.\1.cross_attn_layer_norm."),
    (rf"panoptic_head\.{_LAYER}\.norms\.1\.", rf"{_QUERIES}.decoder.layers.\1.self_attn_layer_norm."),
    (rf"panoptic_head\.{_LAYER}\.norms\.2\.", rf"{_QUERIES}.decoder.layers.\1.final_layer_norm."),
    (rf"panoptic_head\.{_LAYER}\.", rf"{_QUERIES}.decoder.layers.\1."),
    (r"\.ffns\.0\.layers\.0\.0\.", ".fc1."),
    (r"\.ffns\.0\.layers\.1\.", ".fc2."),
    (r"panoptic_head\.transformer_decoder\.post_norm\.", rf"{_QUERIES}.decoder.layernorm."),
    (r"panoptic_head\.query_embed\.", rf"{_QUERIES}.queries_embedder."),
    (r"panoptic_head\.query_feat\.", rf"{_QUERIES}.queries_features."),
    (r"panoptic_head\.level_embed\.", rf"{_QUERIES}.level_embed."),
    (r"panoptic_head\.cls_embed\.", "class_predictor."),
)
"""Applied to every name in this order, each to what the one before left."""


def convert(source_files: dict[str, Path], out: Path) -> None:
    """Write a folder in transformers' layout from mmdet's checkpoint.

    Args:
        source_files: One file, whatever its name.
        out: Folder to write ``config.json`` and ``model.safetensors`` into.

    Raises:
        ValueError: Not one file, or a file that is no checkpoint of this architecture.
    """
    if len(source_files) != 1:
        raise ValueError(f"Mask2Former is converted from one file, got {sorted(source_files)}; give mmdet's .pth")
    (path,) = source_files.values()
    tensors = read_mmdet(path)
    try:
        config = infer_config(tensors)
        with torch.device("meta"):
            model = Mask2FormerForUniversalSegmentation(config)
        renamed = rename(tensors) | _unused(config)
        # Strict: every tensor of the model is given, and every tensor of the file is used.
        model.load_state_dict(renamed, strict=True, assign=True)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is no Mask2Former with a Swin backbone from mmdet: {error}") from error
    model.save_pretrained(out)


def read_mmdet(path: Path) -> dict[str, Tensor]:
    """Tensors of mmdet's checkpoint under mmdet's names, without the index buffers saved beside them.

    Raises:
        ValueError: A file that holds other things, or no tensors.
    """
    saved = read_tensors(path)
    tensors = saved.get("state_dict", saved)
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} holds no state_dict of tensors; give the file that mmdet publishes")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("relative_position_index")}


def rename(tensors: Mapping[str, Shaped[Tensor, "*shape"]]) -> dict[str, Shaped[Tensor, "*shape"]]:
    """Tensors under the names that transformers' model has in memory.

    Args:
        tensors: By mmdet's name, 2.x or 3.x; on any device, also on meta.

    Returns:
        As many tensors or more: projections stored as one are split into queries, keys and values.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        renamed.update(_convert_one(_new_name(name), tensor))
    return renamed


def _new_name(name: str) -> str:
    for pattern, replacement in _TO_2X:
        name = re.sub(pattern, replacement, name)
    if found := re.fullmatch(r"backbone\.norm(\d+)\.(\w+)", name):
        return f"{_SWIN}.hidden_states_norms.stage{int(found[1]) + 1}.{found[2]}"
    if found := re.fullmatch(r"panoptic_head\.mask_embed\.(\d+)\.(\w+)", name):
        # mmdet counts the activations between the layers.
        return f"{_QUERIES}.decoder.mask_predictor.mask_embedder.{int(found[1]) // 2}.0.{found[2]}"
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _convert_one(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if ".downsample." in name:
        return {name: _reorder_merged(tensor)}
    # Cross-attention stays in one piece in both libraries.
    found = re.fullmatch(r"(.*\.attention)\.qkv\.(\w+)|(.*\.self_attn)\.in_proj_(\w+)", name)
    if found is None:
        return {name: tensor}
    stem, kind = found[1] or found[3], found[2] or found[4]
    return {f"{stem}.{part}_proj.{kind}": piece.clone() for part, piece in zip("qkv", tensor.chunk(3))}


def _reorder_merged(tensor: Shaped[Tensor, "... merged"]) -> Shaped[Tensor, "... merged"]:
    """Reorders the inputs of a patch merger, four pixels of C channels each.

    mmdet reads them channel by channel, each with its pixels row by row; transformers reads pixel by pixel, column by
    column.
    """
    channels = tensor.shape[-1] // 4
    pixels = tensor.unflatten(-1, (channels, 4)).transpose(-1, -2)
    return pixels[..., [0, 2, 1, 3], :].flatten(-2).contiguous()


def _unused(config: Mask2FormerConfig) -> dict[str, Tensor]:
    """What transformers' model has and mmdet's has not: a norm that nothing reads, and the loss's class weights."""
    backbone: Any = config.backbone_config
    width = backbone.embed_dim * 2 ** (len(backbone.depths) - 1)
    class_weights = torch.ones(len(config.id2label or {}) + 1)
    class_weights[-1] = config.no_object_weight
    return {
        f"{_SWIN}.swin.layernorm.weight": torch.ones(width),
        f"{_SWIN}.swin.layernorm.bias": torch.zeros(width),
        "criterion.empty_weight": class_weights,
    }


def infer_config(tensors: Mapping[str, Shaped[Tensor, "*shape"]]) -> Mask2FormerConfig:
    """The architecture, read off the shapes; a class gets GenEval's name where there are COCO's 80.

    Raises:
        KeyError: A tensor that every Mask2Former has is missing.
    """
    shapes = {_new_name(name): tuple(tensor.shape) for name, tensor in tensors.items()}
    num_labels = shapes["class_predictor.weight"][0] - 1
    names = OBJECT_NAMES if num_labels == len(OBJECT_NAMES) else [f"class {i}" for i in range(num_labels)]
    num_queries, hidden = shapes[f"{_QUERIES}.queries_features.weight"]
    levels = shapes[f"{_PIXELS}.level_embed"][0]
    sampled = shapes[f"{_PIXELS}.encoder.layers.0.self_attn.sampling_offsets.weight"][0]
    return Mask2FormerConfig(
        backbone_config=_backbone_config(shapes),
        feature_size=shapes[f"{_PIXELS}.adapter_1.0.weight"][0],
        mask_feature_size=shapes[f"{_PIXELS}.mask_projection.weight"][0],
        hidden_dim=hidden,
        num_queries=num_queries,
        num_attention_heads=sampled // (levels * _NUM_POINTS * 2),
        encoder_layers=_count(shapes, rf"{re.escape(_PIXELS)}\.encoder\.layers\.(\d+)\.fc1\.weight"),
        encoder_feedforward_dim=shapes[f"{_PIXELS}.encoder.layers.0.fc1.weight"][0],
        # transformers counts the prediction before the first layer as one.
        decoder_layers=_count(shapes, rf"{re.escape(_QUERIES)}\.decoder\.layers\.(\d+)\.fc1\.weight") + 1,
        dim_feedforward=shapes[f"{_QUERIES}.decoder.layers.0.fc1.weight"][0],
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )


def _backbone_config(shapes: Mapping[str, tuple[int, ...]]) -> SwinConfig:
    stem = f"{_SWIN}.swin.encoder.layers"
    width, _, patch, _ = shapes[f"{_SWIN}.swin.embeddings.patch_embeddings.projection.weight"]
    stages = range(_count(shapes, rf"{re.escape(stem)}\.(\d+)\.blocks\.0\.mlp\.fc1\.weight"))
    depths = [_count(shapes, rf"{re.escape(stem)}\.{stage}\.blocks\.(\d+)\.mlp\.fc1\.weight") for stage in stages]
    table = "attention.relative_position_bias.relative_position_bias_table"
    tables: list[tuple[int, ...]] = [shapes[f"{stem}.{stage}.blocks.0.{table}"] for stage in stages]
    outputs: dict[str, Any] = {"out_features": [f"stage{stage + 1}" for stage in stages]}
    return SwinConfig(
        image_size=224,
        patch_size=patch,
        embed_dim=width,
        depths=depths,
        num_heads=[heads for _, heads in tables],
        # The table has one row for each offset within a window, (2 w - 1) squared.
        window_size=(math.isqrt(tables[0][0]) + 1) // 2,
        mlp_ratio=shapes[f"{stem}.0.blocks.0.mlp.fc1.weight"][0] / width,
        **outputs,
    )


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    matches: list[Any] = [re.fullmatch(pattern, name) for name in shapes]
    return 1 + max((int(found[1]) for found in matches if found), default=-1)
