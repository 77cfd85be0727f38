"""Loading a policy and its tokenizer from a folder or the hub."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig

from stage_grpo.checkpoints import as_transformers
from stage_grpo.policy.base import ImagePolicy

POLICIES = {"janus": "stage_grpo.policy.janus:JanusPolicy"}
"""``model_type`` of a checkpoint's config -> the policy class that runs it."""


def load_policy(
    model: str | Path, dtype: str | torch.dtype = "float32", attn_implementation: str | None = None
) -> ImagePolicy:
    """Load an image policy.

    Args:
        model: Folder in transformers format or in DeepSeek's original one, which is converted once into a cache beside
            it; or a hub name in transformers format.
        dtype: Dtype of the weights, e.g. ``"float32"`` or ``"bfloat16"``.
        attn_implementation: As in transformers (``"sdpa"``, ``"flash_attention_2"``, ...).

    Raises:
        ValueError: If the folder is missing or not a checkpoint, or if its family is not supported.
    """
    path = Path(model)
    # A name with at most one slash that is no folder may be a hub name; anything else must be a folder.
    if path.exists() or path.is_absolute() or str(model).count("/") > 1 or str(model).startswith("."):
        _check_checkpoint(path)
        model = as_transformers(path)
    try:
        model_type = PreTrainedConfig.get_config_dict(str(model))[0].get("model_type")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model={str(model)!r} is neither a checkpoint folder nor a reachable hub name: {error}"
        ) from error
    if model_type not in POLICIES:
        raise ValueError(f"model={str(model)!r} is a {model_type!r}; supported families: {sorted(POLICIES)}")
    module, name = POLICIES[model_type].split(":")
    policy_class: Any = getattr(import_module(module), name)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        return policy_class.from_pretrained(str(model), dtype=dtype, **options)
    except SafetensorError as error:
        raise ValueError(f"the weights of model={str(model)!r} are torn, fetch or save them again: {error}") from error


def load_tokenizer(policy: ImagePolicy, model: str | Path | None = None) -> Any:
    """Load the tokenizer of a policy's checkpoint and copy its pad token into the policy's config.

    Args:
        policy: A loaded policy.
        model: Where to load from; by default where the policy came from.

    Raises:
        ValueError: If the tokenizer lacks a token that prompts need.
    """
    source = str(model or policy.config.name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    for name in ("bos_token", "pad_token", "boi_token"):
        if getattr(tokenizer, name, None) is None:
            raise ValueError(f"the tokenizer of {source!r} has no {name}; a Janus checkpoint needs one")
    policy.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _check_checkpoint(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"model={str(path)!r} is not a folder; give a transformers-format checkpoint or a hub name")
    if not (path / "config.json").is_file():
        raise ValueError(f"model={str(path)!r} holds no config.json; give a transformers-format checkpoint")
