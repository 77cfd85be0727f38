"""IDEA's own GroundingDINO file, ``groundingdino_swint_ogc.pth``, as a folder in transformers' layout.

The network is transformers' GroundingDino under other names; the fused query-key-value matrices are cut in three. The
architecture is read off the shapes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    SwinConfig,
)

from stage_grpo.weights.convert_clip import read_tensors

NUM_LEVELS = 4
NUM_POINTS = 4
BERT_HEAD_SIZE = 64

_SWIN = "model.backbone.conv_encoder.model."
_BLOCK = rf"{_SWIN}encoder.layers.\1.blocks.\2."

# Tensors that the network does not use, or that stand elsewhere under the name of another.
_UNUSED = re.compile(
    r"bert\.pooler\.|bert\.embeddings\.position_ids|label_enc\.|.*relative_position_index|.*attn_mask$"
    r"|transformer\.decoder\.bbox_embed\.|bbox_embed\.[1-9]"
)
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"backbone\.0\.patch_embed\.proj\.", f"{_SWIN}embeddings.patch_embeddings.projection."),
        (r"backbone\.0\.patch_embed\.norm\.", f"{_SWIN}embeddings.norm."),
        (r"backbone\.0\.layers\.(\d+)\.downsample\.", rf"{_SWIN}encoder.layers.\1.downsample."),
        (r"backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.norm1\.", f"{_BLOCK}layernorm_before."),
        (r"backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.norm2\.", f"{_BLOCK}layernorm_after."),
        (r"backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.", f"{_BLOCK}intermediate.dense."),
        (r"backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\.", f"{_BLOCK}output.dense."),
        (r"backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.attn\.proj\.", f"{_BLOCK}attention.output.dense."),
        (r"backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.attn\.", f"{_BLOCK}attention.self."),
        (r"backbone\.0\.norm(\d)\.", lambda match: f"{_SWIN}hidden_states_norms.stage{int(match[1]) + 1}."),
        (r"bert\.", "model.text_backbone."),
        (r"feat_map\.", "model.text_projection."),
        (r"input_proj\.", "model.input_proj_vision."),
        (r"transformer\.level_embed", "model.level_embed"),
        (r"transformer\.tgt_embed\.", "model.query_position_embeddings."),
        (r"transformer\.enc_output", "model.enc_output"),
        (r"transformer\.enc_out_bbox_embed\.", "model.encoder_output_bbox_embed."),
        (r"transformer\.encoder\.layers\.(\d+)\.", r"model.encoder.layers.\1.deformable_layer."),
        (r"transformer\.encoder\.text_layers\.(\d+)\.", r"model.encoder.layers.\1.text_enhancer_layer."),
        (r"transformer\.encoder\.fusion_layers\.(\d+)\.", r"model.encoder.layers.\1.fusion_layer."),
        (r"transformer\.decoder\.ref_point_head\.", "model.decoder.reference_points_head."),
        (r"transformer\.decoder\.norm\.", "model.decoder.layer_norm."),
        (r"transformer\.decoder\.", "model.decoder."),
        (r"bbox_embed\.0\.", "bbox_embed.0."),
    )
]
_INNER_RENAMES = {
    "deformable_layer": {
        "norm1": "self_attn_layer_norm", "norm2": "final_layer_norm", "linear1": "fc1", "linear2": "fc2",
    },
    "text_enhancer_layer": {
        "norm1": "layer_norm_before", "norm2": "layer_norm_after", "linear1": "fc1", "linear2": "fc2",
    },
    "fusion_layer": {
        "gamma_v": "vision_param", "gamma_l": "text_param", "layer_norm_v": "layer_norm_vision",
        "layer_norm_l": "layer_norm_text", "v_proj": "vision_proj", "l_proj": "text_proj",
        "values_v_proj": "values_vision_proj", "values_l_proj": "values_text_proj",
        "out_v_proj": "out_vision_proj", "out_l_proj": "out_text_proj",
    },
    "decoder.layers": {
        "cross_attn": "encoder_attn", "norm1": "encoder_attn_layer_norm", "ca_text": "encoder_attn_text",
        "catext_norm": "encoder_attn_text_layer_norm", "norm2": "self_attn_layer_norm",
        "norm3": "final_layer_norm", "linear1": "fc1", "linear2": "fc2",
    },
}  # fmt: skip
"""Parts of a name, by the part of the network that they are in."""


def convert(source_files: Mapping[str, Path], out: Path) -> None:
    """Writes a folder in transformers' layout.

    Args:
        source_files: The one ``.pth`` file, and the files of BERT's tokenizer, by name.
        out: An empty folder.

    Raises:
        ValueError: No or several ``.pth`` files, or tensors that are not those of GroundingDINO.
    """
    files = [path for name, path in source_files.items() if name.endswith(".pth")]
    if len(files) != 1:
        raise ValueError(
            f"found {len(files)} .pth files among {sorted(source_files)}; give groundingdino_swint_ogc.pth"
        )
    stored = read_tensors(files[0])
    original = {name.removeprefix("module."): value for name, value in stored.get("model", stored).items()}
    save_file(rename(original), out / "model.safetensors", metadata={"format": "pt"})
    read_config(original).save_pretrained(out)
    GroundingDinoImageProcessorPil().save_pretrained(out)
    for name, path in source_files.items():
        if not name.endswith(".pth"):
            shutil.copyfile(path, out / name)
    _check(out)


def rename(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under transformers' names.

    Args:
        original: Tensors under IDEA's names.

    Raises:
        ValueError: A name that is not one of GroundingDINO's.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in original.items():
        if not _UNUSED.match(name):
            renamed |= _cut(_new_name(name), value)
    return {name: value.contiguous() for name, value in renamed.items()}


def read_config(original: Mapping[str, Tensor]) -> GroundingDinoConfig:
    """The architecture of a network, from the shapes of its tensors.

    Args:
        original: Tensors under IDEA's names.

    Raises:
        ValueError: A tensor is missing.
    """
    try:
        return _read_config(original)
    except KeyError as error:
        raise ValueError(f"the file has no tensor {error}; give groundingdino_swint_ogc.pth") from None


def _read_config(original: Mapping[str, Tensor]) -> GroundingDinoConfig:
    stages = _count(original, r"backbone\.0\.layers\.(\d+)\.")
    tables = [
        original[f"backbone.0.layers.{stage}.blocks.0.attn.relative_position_bias_table"].shape
        for stage in range(stages)
    ]
    words = original["bert.embeddings.word_embeddings.weight"].shape
    encoder = original["transformer.encoder.layers.0.linear1.weight"].shape
    decoder = original["transformer.decoder.layers.0.linear1.weight"].shape
    swin = SwinConfig(
        embed_dim=original["backbone.0.patch_embed.proj.weight"].shape[0],
        depths=[_count(original, rf"backbone\.0\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)],
        num_heads=[heads for _, heads in tables],
        window_size=(round(tables[0][0] ** 0.5) + 1) // 2,
        image_size=224,
        out_indices=list(range(2, stages + 1)),  # pyright: ignore[reportCallIssue]
    )
    bert = BertConfig(
        vocab_size=words[0],
        hidden_size=words[1],
        num_hidden_layers=_count(original, r"bert\.encoder\.layer\.(\d+)\."),
        num_attention_heads=words[1] // BERT_HEAD_SIZE,
        intermediate_size=original["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=original["bert.embeddings.position_embeddings.weight"].shape[0],
    )
    values: dict[str, Any] = {
        f"{part}_attention_heads": original[name].shape[0] // (NUM_LEVELS * NUM_POINTS)
        for part, name in (
            ("encoder", "transformer.encoder.layers.0.self_attn.attention_weights.weight"),
            ("decoder", "transformer.decoder.layers.0.cross_attn.attention_weights.weight"),
        )
    }
    return GroundingDinoConfig(
        backbone_config=swin,
        text_config=bert,
        d_model=encoder[1],
        num_queries=original["transformer.tgt_embed.weight"].shape[0],
        encoder_layers=_count(original, r"transformer\.encoder\.layers\.(\d+)\."),
        decoder_layers=_count(original, r"transformer\.decoder\.layers\.(\d+)\."),
        encoder_ffn_dim=encoder[0],
        decoder_ffn_dim=decoder[0],
        **values,
    )


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Numbers that occur at a place in the names."""
    return len({match[1] for match in (re.match(pattern, name) for name in tensors) if match})


def _new_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        if pattern.match(name):
            new = pattern.sub(replacement, name, count=1)
            break
    else:
        raise ValueError(f"the tensor {name!r} is not one of GroundingDINO's; give groundingdino_swint_ogc.pth")
    for part, names in _INNER_RENAMES.items():
        if f".{part}." in new:
            head, _, tail = new.partition(f".{part}.")
            return f"{head}.{part}." + ".".join(names.get(word, word) for word in tail.split("."))
    return new


def _cut(name: str, value: Tensor) -> dict[str, Tensor]:
    """A fused projection as its three, anything else as it is."""
    fused = re.search(r"\.(qkv\.|in_proj_)(weight|bias)$", name)
    if fused is None:
        return {name: value}
    stem = name[: fused.start()]
    parts = zip(("query", "key", "value"), value.chunk(3))
    return {f"{stem}.{projection}.{fused[2]}": part for projection, part in parts}


def _check(folder: Path) -> None:
    loaded: Any = GroundingDinoForObjectDetection.from_pretrained(folder, output_loading_info=True)
    report = loaded[1]
    wrong = {
        what: sorted(map(str, names))
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        # The norm behind the last stage of the image encoder is made but never used.
        if (names := [name for name in report.get(what, ()) if "swin.layernorm" not in str(name)])
    }
    if wrong:
        raise ValueError(f"the file does not fit GroundingDINO: {wrong}; give groundingdino_swint_ogc.pth")
