"""``config.json`` of DeepSeek's format and of transformers' format, translated either way.

DeepSeek's config names its vision tower and its VQ model (``siglip_large_patch16_384``, ``VQ-16``) and leaves their
sizes to the code; transformers spells all sizes out. Sizes other than the named ones are written beside the name,
under ``params``: this package reads them back, DeepSeek's code does not know them.

Source: github.com/deepseek-ai/Janus, ``janus/models/{modeling_vlm,siglip_vit,vq_model}.py``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from stage_grpo.checkpoints.errors import need, read_json

ORIGINAL, TRANSFORMERS = "original", "transformers"
MODEL_TYPES = {"multi_modality": ORIGINAL, "janus": TRANSFORMERS}
"""``model_type`` of a config -> name of its format."""

SECTIONS = ("vision", "aligner", "gen_vision", "gen_aligner", "gen_head")
TOWERS = {
    "siglip_large_patch16_384": {"width": 1024, "layers": 24, "heads": 16, "patch_size": 16, "mlp_ratio": 4},
}
"""Vision towers by name, with the sizes that DeepSeek's code gives them."""
TOWER_SIZES = ("width", "layers", "heads", "patch_size", "mlp_ratio")
CUSTOM_TOWER = "siglip_custom"
VQ_NAME = "VQ-16"
VQ_SIZES = {"base_channels": 128, "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2, "latent_channels": 256}
"""Sizes of the VQ model in DeepSeek's code."""
LLAMA_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pretraining_tp",
    "tie_word_embeddings",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
)
ROPE_KEYS = ("rope_theta", "rope_scaling")


def format_of(folder: Path) -> str:
    """``"original"`` or ``"transformers"``, by the ``model_type`` of a checkpoint's config.

    Raises:
        ValueError: If the folder is no checkpoint of Janus or Janus-Pro.
    """
    need(folder.is_dir(), f"{str(folder)!r} is not a folder; give a checkpoint folder")
    config = read_json(folder / "config.json")
    name = MODEL_TYPES.get(str(config.get("model_type")))
    if name is None:
        raise ValueError(
            f"{folder} is a {config.get('model_type')!r} checkpoint; Janus and Janus-Pro are {sorted(MODEL_TYPES)}"
        )
    missing = [f"{section}_config" for section in (*SECTIONS, "language") if f"{section}_config" not in config]
    need(
        name == TRANSFORMERS or not missing,
        f"{folder} is not a Janus or Janus-Pro checkpoint: its config.json lacks {', '.join(missing)}",
    )
    return name


def to_transformers_config(original: dict[str, Any], token_ids: dict[str, int]) -> JanusConfig:
    """Translate DeepSeek's config.

    Args:
        original: Content of its ``config.json``.
        token_ids: Ids of the tokens ``bos``, ``eos``, ``pad`` and ``image``.

    Raises:
        ValueError: If the config lacks an entry, or asks for something that transformers' Janus does not have.
    """
    try:
        # A copy: transformers writes into the dictionaries that it is given.
        return _translate(copy.deepcopy(original), token_ids)
    except KeyError as error:
        raise ValueError(f"config.json lacks the entry {error}; download it again") from error
    except (TypeError, StrictDataclassError) as error:
        raise ValueError(f"config.json has an entry of the wrong kind: {error}") from error


def _translate(original: dict[str, Any], token_ids: dict[str, int]) -> JanusConfig:
    params = {section: original[f"{section}_config"].get("params", {}) for section in SECTIONS}
    language: dict[str, Any] = original["language_config"]
    family = language.get("model_type", "llama")
    need(family == "llama", f"language_config.model_type is {family!r}; only 'llama' can be converted")
    _check_classes(original)
    options = {key: language[key] for key in (*LLAMA_KEYS, *ROPE_KEYS) if language.get(key) is not None}
    options |= {f"{name}_token_id": token_ids[name] for name in ("bos", "eos", "pad")}
    text: Any = LlamaConfig(**options)
    tied = bool(language.get("tie_word_embeddings", False))
    config = JanusConfig(
        text_config=text.to_dict(),
        vision_config=_vision_config(params["vision"], params["aligner"]),
        vq_config=_vq_config(params["gen_vision"], params["gen_aligner"], params["gen_head"]),
        image_token_id=token_ids["image"],
        # JanusConfig's own default is True: the next tie_weights() would put the text embedding over the text head.
        tie_word_embeddings=tied,
        architectures=["JanusForConditionalGeneration"],
    )
    _check_widths(config, params)
    outside = {name: i for name, i in token_ids.items() if i >= text.vocab_size}
    need(not outside, f"the tokenizer has ids beyond language_config.vocab_size={text.vocab_size}: {outside}")
    return config


def to_original_config(config: Any) -> dict[str, Any]:
    """Translate transformers' config, the inverse of `to_transformers_config`.

    Args:
        config: A ``JanusConfig``.

    Raises:
        ValueError: If the config has something that DeepSeek's format cannot say.
    """
    vision, vq, text = config.vision_config, config.vq_config, config.text_config
    _check_expressible(config)
    rope = dict(text.rope_parameters)
    language = {key: getattr(text, key) for key in LLAMA_KEYS if getattr(text, key, None) is not None}
    language |= {"model_type": "llama", "rope_theta": rope.pop("rope_theta", 10000.0)}
    language["tie_word_embeddings"] = config.tie_word_embeddings
    if rope.get("rope_type", "default") != "default":
        language["rope_scaling"] = rope
    aligner = {"projector_type": "mlp_gelu"}
    head = {"image_token_embed": vq.projection_dim, "image_token_size": vq.num_embeddings}
    gen_aligner = {"depth": vq.num_hidden_layers, "input_dim": vq.embed_dim, "n_embed": vq.projection_dim}
    params: dict[str, tuple[str, dict[str, Any]]] = {
        "aligner": (
            "MlpProjector",
            aligner | {"depth": vision.depth, "input_dim": vision.hidden_size, "n_embed": vision.projection_dim},
        ),
        "gen_aligner": ("MlpProjector", aligner | gen_aligner),
        "gen_head": ("vision_head", head | {"n_embed": vq.image_token_embed_dim}),
        "gen_vision": (VQ_NAME, {"image_token_size": vq.num_embeddings, "n_embed": vq.embed_dim} | _vq_params(vq)),
        "vision": ("CLIPVisionTower", _vision_params(vision)),
    }
    sections = {
        f"{name}_config": {"cls": cls, "model_type": name, "params": values} for name, (cls, values) in params.items()
    }
    head_of_file = {"architectures": ["MultiModalityCausalLM"], "model_type": "multi_modality"}
    return head_of_file | sections | {"language_config": language}


def _check_classes(original: dict[str, Any]) -> None:
    expected = {
        "vision": "CLIPVisionTower",
        "aligner": "MlpProjector",
        "gen_vision": VQ_NAME,
        "gen_aligner": "MlpProjector",
        "gen_head": "vision_head",
    }
    for section, cls in expected.items():
        found = original[f"{section}_config"].get("cls")
        need(str(found).endswith(cls), f"{section}_config.cls is {found!r}; only {cls!r} can be converted")
    for section in ("aligner", "gen_aligner"):
        kind = original[f"{section}_config"].get("params", {}).get("projector_type")
        need(kind == "mlp_gelu", f"{section}_config.projector_type is {kind!r}; only 'mlp_gelu' can be converted")


def _vision_config(params: dict[str, Any], aligner: dict[str, Any]) -> JanusVisionConfig:
    name = params.get("model_name")
    sizes = TOWERS.get(str(name), {}) | {key: params[key] for key in TOWER_SIZES if key in params}
    need(len(sizes) == len(TOWER_SIZES), f"vision_config.model_name is {name!r}; known towers: {sorted(TOWERS)}")
    for key in ("pixel_mean", "pixel_std"):
        need(params.get(key) is None, f"vision_config.{key}={params.get(key)!r} has no counterpart in transformers")
    # DeepSeek's code counts from the end, -1 being the last layer, or takes the first n layers.
    select = params.get("select_layer", -2)
    layers = min(sizes["layers"], select if select > 0 else sizes["layers"] + select + 1)
    size = params.get("image_size", 336)
    return JanusVisionConfig(
        hidden_size=sizes["width"],
        num_hidden_layers=layers,
        num_attention_heads=sizes["heads"],
        patch_size=sizes["patch_size"],
        mlp_ratio=float(sizes["mlp_ratio"]),
        image_size=size,
        num_image_tokens=(size // sizes["patch_size"]) ** 2,
        projection_dim=aligner["n_embed"],
        depth=aligner.get("depth", 1),
    )


def _vision_params(vision: Any) -> dict[str, Any]:
    sizes = {
        "width": vision.hidden_size,
        "layers": vision.num_hidden_layers,
        "heads": vision.num_attention_heads,
        "patch_size": vision.patch_size,
        "mlp_ratio": vision.mlp_ratio,
    }
    named = next((name for name, known in TOWERS.items() if known == sizes), None)
    shared = {"image_size": vision.image_size, "select_feature": "same", "select_layer": -1}
    return {"model_name": named, **shared} if named else {"model_name": CUSTOM_TOWER, **shared, **sizes}


def _vq_config(vision: dict[str, Any], aligner: dict[str, Any], head: dict[str, Any]) -> JanusVQVAEConfig:
    return JanusVQVAEConfig(
        embed_dim=vision["n_embed"],
        num_embeddings=vision["image_token_size"],
        projection_dim=aligner["n_embed"],
        num_hidden_layers=aligner.get("depth", 1),
        image_token_embed_dim=head["n_embed"],
        **{key: vision.get(key, value) for key, value in VQ_SIZES.items()},
    )


def _vq_params(vq: Any) -> dict[str, Any]:
    sizes = {key: getattr(vq, key) for key in VQ_SIZES}
    sizes["channel_multiplier"] = list(sizes["channel_multiplier"])
    return {} if sizes == VQ_SIZES else sizes


def _check_widths(config: Any, params: dict[str, dict[str, Any]]) -> None:
    """Transformers has one number where DeepSeek's config has several: they must agree."""
    hidden, vision, head = config.text_config.hidden_size, params["gen_vision"], params["gen_head"]
    equal = {
        "aligner_config.n_embed": (params["aligner"]["n_embed"], hidden),
        "gen_aligner_config.n_embed": (params["gen_aligner"]["n_embed"], hidden),
        "gen_head_config.n_embed": (head["n_embed"], hidden),
        "gen_head_config.image_token_embed": (head["image_token_embed"], params["gen_aligner"]["n_embed"]),
        "gen_head_config.image_token_size": (head["image_token_size"], vision["image_token_size"]),
        "gen_aligner_config.input_dim": (params["gen_aligner"]["input_dim"], vision["n_embed"]),
        "aligner_config.input_dim": (params["aligner"]["input_dim"], config.vision_config.hidden_size),
    }
    for key, (found, expected) in equal.items():
        need(found == expected, f"{key} is {found}, but the rest of the config makes it {expected}")


def _check_expressible(config: Any) -> None:
    vision, vq = config.vision_config, config.vq_config
    fixed = {
        "text_config.model_type": (config.text_config.model_type, "llama"),
        "vision_config.hidden_act": (vision.hidden_act, "gelu"),
        "vision_config.attention_bias": (vision.attention_bias, True),
        "vision_config.use_qk_norm": (vision.use_qk_norm, False),
        "vision_config.layer_norm_eps": (vision.layer_norm_eps, 1e-6),
        "vision_config.num_channels": (vision.num_channels, 3),
        "vq_config.hidden_act": (vq.hidden_act, "gelu"),
        "vq_config.double_latent": (vq.double_latent, False),
        "vq_config.in_channels": (vq.in_channels, 3),
        "vq_config.out_channels": (vq.out_channels, 3),
    }
    for key, (found, expected) in fixed.items():
        need(found == expected, f"{key} is {found!r}; the original format has only {expected!r}")
