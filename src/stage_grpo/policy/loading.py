"""Loading a policy and its tokenizer from a folder or the hub."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig

from stage_grpo.checkpoints import as_transformers
from stage_grpo.checkpoints.cache import remedy_on_the_hub
from stage_grpo.checkpoints.configs import MODEL_TYPES, ORIGINAL
from stage_grpo.policy.adapters import is_adapter, merge_adapter, read_adapter, unreachable_base
from stage_grpo.policy.base import ImagePolicy

POLICIES = {"janus": "stage_grpo.policy.janus:JanusPolicy"}
"""``model_type`` of a checkpoint's config -> the policy class that runs it."""
MAX_ROUNDING = 0.1
"""Share of an adapter's change that rounding the merged weights may reach without a warning."""
_LOGGER = logging.getLogger(__name__)


def load_policy(
    model: str | Path,
    dtype: str | torch.dtype = "float32",
    attn_implementation: str | None = None,
    base: str | Path | None = None,
) -> ImagePolicy:
    """Load an image policy.

    Args:
        model: Folder in transformers format or in DeepSeek's original one, which is converted once into a cache beside
            it; a folder with a LoRA adapter, which is merged into its base in memory; or a hub name in transformers
            format.
        dtype: Dtype of the weights: ``"float32"``, ``"bfloat16"``, or ``"auto"`` for that of the checkpoint.
        attn_implementation: As in transformers (``"sdpa"``, ``"flash_attention_2"``, ...).
        base: Checkpoint that an adapter belongs to; by default the one that its config names.

    Raises:
        ValueError: If the folder is missing or not a checkpoint, or if its family is not supported; if an adapter is
            torn, does not fit its base, or its base cannot be loaded; if ``base`` is given and there is no adapter.
    """
    if is_adapter(model):
        return _load_merged(model, dtype, attn_implementation, base)
    if base is not None:
        raise ValueError(f"base={str(base)!r} is for adapters, and model={str(model)!r} is none; leave base out")
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
    if MODEL_TYPES.get(str(model_type)) == ORIGINAL:
        remedy = remedy_on_the_hub(str(model))
        raise ValueError(f"model={str(model)!r} is a hub name in DeepSeek's own format; {remedy}")
    family = policy_class(model_type, model)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        return family.from_pretrained(str(model), dtype=dtype, **options)
    except SafetensorError as error:
        raise ValueError(f"the weights of model={str(model)!r} are torn, fetch or save them again: {error}") from error


def policy_class(model_type: str | None, model: str | Path) -> Any:
    """The class that runs a family; its module is imported, which may make the family known to transformers.

    Args:
        model_type: As a checkpoint's config says.
        model: What error messages call the checkpoint.

    Raises:
        ValueError: If the family is not supported.
    """
    if model_type not in POLICIES:
        raise ValueError(f"model={str(model)!r} is a {model_type!r}; supported families: {sorted(POLICIES)}")
    module, name = POLICIES[model_type].split(":")
    return getattr(import_module(module), name)


def _load_merged(
    folder: str | Path, dtype: str | torch.dtype, attn_implementation: str | None, base: str | Path | None
) -> ImagePolicy:
    adapter = read_adapter(folder, base)
    target = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    # Any dtype but float32 is reached by rounding the merged weights, so the base comes as it is stored.
    loaded_as = dtype if target == torch.float32 else "auto"
    try:
        policy: Any = load_policy(adapter.base, loaded_as, attn_implementation)
    except (OSError, ValueError) as error:
        raise unreachable_base(adapter, error) from error
    policy.tokenizer_source = policy.config.name_or_path
    lost = merge_adapter(policy, adapter, target)
    if lost > MAX_ROUNDING:
        _LOGGER.warning(
            "rounding %s to %s moves its weights by %.0f %% of what the adapter does; float32 keeps it whole",
            folder,
            policy.dtype,
            100 * lost,
        )
    # These weights stand in no file. With the base's name, TRL would take the base for the reference policy.
    policy.config.name_or_path = ""
    return policy


def load_tokenizer(policy: ImagePolicy, model: str | Path | None = None) -> Any:
    """Load the tokenizer of a policy's checkpoint and copy its pad token into the policy's config.

    Args:
        policy: A loaded policy.
        model: Where to load from; by default where the policy, or the base of its adapter, came from.

    Raises:
        ValueError: If the tokenizer lacks a token that prompts need.
    """
    source = str(model or checkpoint_of(policy))
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    for name in ("bos_token", "pad_token", "boi_token"):
        if getattr(tokenizer, name, None) is None:
            raise ValueError(f"the tokenizer of {source!r} has no {name}; a Janus checkpoint needs one")
    policy.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer


def checkpoint_of(policy: ImagePolicy) -> str:
    """Folder or hub name with the tokenizer and processor of a policy: where it, or its adapter's base, came from."""
    return getattr(policy, "tokenizer_source", policy.config.name_or_path)


def _check_checkpoint(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"model={str(path)!r} is not a folder; give a transformers-format checkpoint or a hub name")
    if not (path / "config.json").is_file():
        raise ValueError(f"model={str(path)!r} holds no config.json; give a transformers-format checkpoint")
