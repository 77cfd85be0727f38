"""LoRA adapters on disk: reading what a run left behind, and merging it into its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from stage_grpo.checkpoints.errors import need, read_json, shorten
from stage_grpo.checkpoints.shards import read_tensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLED_WEIGHTS = "adapter_model.bin"
_REMEDY = "say where it is: `stage merge {} OUT --base PATH`, or load_policy(..., base=PATH)"
# Each of these trains something besides the low-rank factors, which a merge of those alone would drop silently.
_UNSUPPORTED = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "megatron_config",
    "use_dora",
    "lora_bias",
)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, read from its folder.

    Attributes:
        folder: Where it stands.
        base: Folder or hub name of the checkpoint that it was trained on.
        config: Rank, scale and target modules.
        tensors: Low-rank factors in float32, by their names in the file.
    """

    folder: Path
    base: str
    config: LoraConfig
    tensors: dict[str, Tensor]


def is_adapter(path: str | Path) -> bool:
    """Whether a path is a folder that holds an adapter and no whole checkpoint.

    Raises:
        ValueError: If it holds both, so that it is not clear which one is meant.
    """
    folder = Path(path)
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    need(
        not (folder / "config.json").exists(),
        f"{folder} holds a whole checkpoint (config.json) and an adapter ({ADAPTER_CONFIG}); move one of them away",
    )
    return True


def read_adapter(path: str | Path, base: str | Path | None = None) -> Adapter:
    """Read a LoRA adapter: the output folder of a run with ``use_peft``, or one of its checkpoints.

    Args:
        path: The folder.
        base: Checkpoint that the adapter belongs to; by default the one that its config names.

    Raises:
        ValueError: If a file is missing, torn or no safetensors; if the adapter is none of plain LoRA; if no base is
            known, or the base is an adapter itself.
    """
    folder = Path(path)
    need(
        (folder / ADAPTER_WEIGHTS).is_file() or not (folder / _PICKLED_WEIGHTS).is_file(),
        f"{folder / _PICKLED_WEIGHTS} is a pickle, which may execute code, and is refused; "
        "save the adapter again with peft's save_pretrained, which writes safetensors",
    )
    need(
        (folder / ADAPTER_WEIGHTS).is_file(),
        f"{folder / ADAPTER_WEIGHTS} is missing; copy the whole folder again, or take another checkpoint of the run",
    )
    config = _read_config(folder)
    tensors = {name: tensor.float() for name, tensor in read_tensors(folder / ADAPTER_WEIGHTS)}
    source = str(base or config.base_model_name_or_path or "")
    need(source, f"{folder / ADAPTER_CONFIG} names no base checkpoint; {_REMEDY.format(folder)}")
    need(
        not (Path(source) / ADAPTER_CONFIG).is_file(),
        f"the base of {folder} is {source!r}, which is an adapter itself; merge that one first: "
        f"`stage merge {source} OUT`, then --base OUT",
    )
    return Adapter(folder, source, config, tensors)


def check_no_adapter(name: str, value: str) -> None:
    """Refuse an adapter where a whole checkpoint is needed: to train from, and so as reference policy.

    Args:
        name: Config key, for the message.
        value: Its value, a folder or hub name.

    Raises:
        ValueError: If the value is a folder with an adapter.
    """
    need(
        not is_adapter(value),
        f"{name}={value!r} is a LoRA adapter, and training needs a whole checkpoint, to train and as reference; "
        f"run `stage merge {value} OUT`, then set {name} to OUT",
    )


def unreachable_base(adapter: Adapter, error: Exception) -> ValueError:
    """The error of an adapter whose base cannot be loaded, in one line."""
    return ValueError(
        f"the base of adapter {adapter.folder}, {adapter.base!r}, cannot be loaded from here; "
        f"{_REMEDY.format(adapter.folder)} ({' '.join(str(error).split())})"
    )


def merge_adapter(policy: Any, adapter: Adapter, dtype: torch.dtype | None = None) -> float:
    """Add an adapter to the weights of its base, in place, and round once.

    The product of the factors is added to the weight in float32, and the sum is rounded to ``dtype``.

    Args:
        policy: The base policy, an ``ImagePolicy``; afterwards an ordinary policy with only the language model
            trainable.
        adapter: The adapter.
        dtype: Dtype of all weights afterwards; None leaves each in its own.

    Returns:
        How far rounding moved the adapted weights, as a share of how far the adapter did (Frobenius norms): 0 in
        float32, 1 and more if the adapter drowns in it.

    Raises:
        ValueError: If the adapter does not fit the policy, or makes numbers that are not finite.
    """
    try:
        # Factors on the meta device: drawing initial values would move the global random state.
        model = PeftModel(policy, adapter.config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ValueError(f"adapter {adapter.folder} does not fit its base {adapter.base!r}: {error}") from error
    _check_fit(adapter, get_peft_model_state_dict(model, save_embedding_layers=False))
    change = rounding = 0.0
    for name, layer in list(policy.named_modules()):
        if isinstance(layer, LoraLayer):
            moved, rounded = _merge_layer(name, layer, adapter, dtype)
            change, rounding = change + moved, rounding + rounded
    # Not merge_and_unload: it compares the text embedding with the *image* head, finds them different, and writes
    # tie_word_embeddings=false into the config of a checkpoint whose text head is tied.
    tuner: Any = model.base_model
    tuner.unload()
    if dtype is not None:
        _cast_parameters(policy, dtype)
    policy.freeze()
    policy.eval()
    return (rounding / change) ** 0.5 if change else 0.0


def _cast_parameters(policy: Any, dtype: torch.dtype) -> None:
    """Round all weights as loading in a dtype does: computed buffers, such as rotary frequencies, stay in float32."""
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(dtype)
    for config in (policy.config, *(getattr(policy.config, name) for name in policy.config.sub_configs)):
        config.dtype = dtype


def _read_config(folder: Path) -> LoraConfig:
    content = read_json(folder / ADAPTER_CONFIG)
    kind = content.get("peft_type")
    need(kind == "LORA", f"{folder / ADAPTER_CONFIG}: peft_type={kind!r} is not supported; only LORA is")
    for name in _UNSUPPORTED:
        need(
            not content.get(name),
            f"{folder / ADAPTER_CONFIG}: {name}={content.get(name)!r} is not supported; merge this adapter with peft",
        )
    bias = content.get("bias", "none")
    need(bias == "none", f"{folder / ADAPTER_CONFIG}: bias={bias!r} is not supported; merge this adapter with peft")
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG} is not a config that peft accepts: {error}") from error
    return config


def _check_fit(adapter: Adapter, expected: dict[str, Tensor]) -> None:
    where = f"adapter {adapter.folder} does not fit its base {adapter.base!r}"
    unknown = sorted(adapter.tensors.keys() - expected.keys())
    need(not unknown, f"{where}, which has no place for {shorten(unknown)}; give the checkpoint it was trained on")
    missing = sorted(expected.keys() - adapter.tensors.keys())
    need(not missing, f"{where}: it lacks {shorten(missing)}; copy it again, or give the checkpoint it was trained on")
    for name, tensor in adapter.tensors.items():
        shape, needed = tuple(tensor.shape), tuple(expected[name].shape)
        need(
            shape == needed,
            f"{where}: {name!r} has shape {shape}, the base needs {needed}; give the checkpoint it was trained on",
        )


def _merge_layer(name: str, layer: LoraLayer, adapter: Adapter, dtype: torch.dtype | None) -> tuple[float, float]:
    """Merge one layer; gives the squared norms of the change and of the rounding."""
    # peft's own loading would round the factors to the dtype of the base.
    for letter, factors in (("A", layer.lora_A), ("B", layer.lora_B)):
        factor: Any = factors["default"]
        factor.weight = nn.Parameter(adapter.tensors[f"base_model.model.{name}.lora_{letter}.weight"], False)
    base: Any = layer.get_base_layer()
    tuned: Any = layer
    before = base.weight.data
    base.weight.data = before.float()
    try:
        tuned.merge(safe_merge=True)
    except ValueError as error:
        raise ValueError(f"adapter {adapter.folder} makes {name} infinite or NaN; take another checkpoint") from error
    exact = base.weight.data
    base.weight.data = exact.to(dtype or before.dtype)
    change, rounding = exact - before.float(), exact - base.weight.data.float()
    return change.square().sum().item(), rounding.square().sum().item()
