"""How large a policy is, from its config alone: no weight is read and none is allocated."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers.integrations import deepspeed

from stage_grpo.checkpoints.cache import is_original
from stage_grpo.checkpoints.configs import format_of, to_transformers_config
from stage_grpo.checkpoints.errors import read_json
from stage_grpo.policy.adapters import ADAPTER_CONFIG, is_adapter
from stage_grpo.policy.base import ImagePolicy
from stage_grpo.policy.loading import policy_class

_TOKEN_IDS = {"bos": 0, "eos": 1, "pad": 2, "image": 3}
"""Stand in for the tokenizer's: no size depends on them."""


def _janus_pro(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    """DeepSeek's config of a Janus-Pro, as far as sizes depend on it."""
    aligner = {"projector_type": "mlp_gelu", "depth": 2, "n_embed": hidden}
    sections = {
        "vision": (
            "CLIPVisionTower",
            {"image_size": 384, "model_name": "siglip_large_patch16_384", "select_layer": -1},
        ),
        "aligner": ("MlpProjector", aligner | {"input_dim": 1024}),
        "gen_vision": ("VQ-16", {"image_token_size": 16384, "n_embed": 8}),
        "gen_aligner": ("MlpProjector", aligner | {"input_dim": 8}),
        "gen_head": (
            "vision_head",
            {"image_token_embed": hidden, "image_token_size": 16384, "n_embed": hidden},
        ),
    }
    language = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 102400,
        "max_position_embeddings": 16384,
        "model_type": "llama",
    }
    return {f"{name}_config": {"cls": cls, "params": params} for name, (cls, params) in sections.items()} | {
        "language_config": language
    }


PUBLISHED = {
    "Janus-Pro-1B": _janus_pro(hidden=2048, inner=5632, layers=24, heads=16),
    "Janus-Pro-7B": _janus_pro(hidden=4096, inner=11008, layers=30, heads=32),
}
"""Configs of published checkpoints by the last part of their name, for a plan before the download.

Source: huggingface.co/deepseek-ai/Janus-Pro-1B and -7B, ``config.json``."""


@dataclass(frozen=True)
class PolicySizes:
    """Sizes of a policy. Counts are of parameters; a tied parameter counts once.

    Attributes:
        policy: The policy itself on the meta device, in the dtype of training.
        source: Where the sizes come from, in words.
        parts: Parameters of each sub-model.
        total: All parameters.
        language_model: Those of the language model, which full training trains.
        layers_matmul: Weights of the language model's linear layers: two operations a token each.
        head_matmul: Weights of the image head.
        code_matmul: Weights of the linear layers that embed an image code.
        largest: Largest single parameter of the language model.
        layer: Parameters of one layer of the language model.
    """

    policy: Any
    source: str
    parts: dict[str, int]
    total: int
    language_model: int
    layers_matmul: int
    head_matmul: int
    code_matmul: int
    largest: int
    layer: int

    @property
    def text(self) -> Any:
        """Config of the language model."""
        return self.policy.backbone.config

    @property
    def attention_width(self) -> int:
        """Heads times head size."""
        return self.text.num_attention_heads * self.head_dim

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return getattr(self.text, "head_dim", None) or self.text.hidden_size // self.text.num_attention_heads

    def lora_parameters(self, rank: int, targets: str) -> int:
        """Parameters of LoRA adapters: rank x (inputs + outputs) of each linear layer.

        Args:
            rank: Rank of the adapters.
            targets: Regular expression that the full name of an adapted layer matches.
        """
        names = re.compile(targets)
        linear = [module for name, module in self.policy.named_modules() if names.fullmatch(name)]
        return sum(rank * (module.in_features + module.out_features) for module in linear)


def policy_sizes(model: str | Path, dtype: str = "bfloat16") -> PolicySizes:
    """Measure a policy on the meta device.

    Args:
        model: Checkpoint folder of either format, a folder with an adapter, or a hub name. A hub name is looked up in
            the local cache, then in the table of published checkpoints; nothing is downloaded.
        dtype: ``float32`` or ``bfloat16``.

    Raises:
        ValueError: If the sizes are not known, or the family is not supported.
    """
    config, source = _find_config(Path(model))
    family = policy_class(config.model_type, model)
    with torch.device("meta"):
        policy = family(config).to(getattr(torch, dtype))
    return measure(policy, source)


def sizes_of(policy: Any) -> PolicySizes:
    """Measure a loaded policy on the meta device, where no weight is sharded."""
    # Under ZeRO-3 transformers would shard the sub-models that it builds, which have no data.
    with mock.patch.object(deepspeed, "_hf_deepspeed_config_weak_ref", None), torch.device("meta"):
        return measure(type(policy)(policy.config).to(policy.dtype))


def measure(policy: ImagePolicy, source: str = "a policy in memory") -> PolicySizes:
    """Count the parameters of a policy, on whatever device it is."""
    modules: Any = policy
    parts = {name: _count(child.parameters()) for name, child in policy.inner_model.named_children()}
    total = _count(modules.parameters())
    rest = total - sum(parts.values())
    backbone = policy.backbone
    head, codes = _linear_weights(policy)
    return PolicySizes(
        policy=policy,
        source=source,
        parts={**parts, **({"rest": rest} if rest else {})},
        total=total,
        language_model=_count(backbone.parameters()),
        layers_matmul=_linear(backbone),
        head_matmul=head,
        code_matmul=codes,
        largest=max(p.numel() for p in backbone.parameters()),
        layer=_count(backbone.layers[0].parameters()),
    )


def _find_config(model: Path) -> tuple[Any, str]:
    if is_adapter(model):
        return _find_config(Path(str(read_json(model / ADAPTER_CONFIG).get("base_model_name_or_path"))))
    if model.is_dir():
        return _config_in(model, model), f"{model}/config.json"
    if (snapshot := _in_hub_cache(str(model))) is not None:
        return _config_in(snapshot, model), f"{model} in the hub cache"
    if model.name in PUBLISHED:
        config = to_transformers_config(PUBLISHED[model.name], _TOKEN_IDS)
        return config, f"the published sizes of {model.name}"
    raise ValueError(
        f"model={str(model)!r} is no folder and not in the hub cache, and its sizes are not known; "
        f"run `hf download {model} config.json`, or give a folder"
    )


def _config_in(folder: Path, model: Path) -> Any:
    """The config in a checkpoint folder, read by the family's own class, as the loader does."""
    if is_original(folder):
        format_of(folder)  # refuses other models of that type
        return to_transformers_config(read_json(folder / "config.json"), _TOKEN_IDS)
    model_type = read_json(folder / "config.json").get("model_type")
    return policy_class(model_type, model).config_class.from_pretrained(str(folder), local_files_only=True)


def _in_hub_cache(name: str) -> Path | None:
    """The folder of a hub name in the local cache, of which at least the config is there."""
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _linear_weights(policy: ImagePolicy) -> tuple[int, int]:
    """Weights that one image token meets in the image head, and on its way into the language model.

    Counted by running both once, so that no family has to name its modules. On the meta device this is free.
    """
    met: list[int] = []
    modules: Any = policy

    def note(module: Any, *_: Any) -> None:
        met.append(module.weight.numel())

    hooks = [module.register_forward_hook(note) for module in modules.modules() if isinstance(module, nn.Linear)]
    weight: Any = policy.get_output_embeddings().weight
    hidden = policy.backbone.config.hidden_size
    with torch.no_grad():
        policy.project(torch.empty(1, hidden, dtype=weight.dtype, device=weight.device))
        head = sum(met) + weight.numel()
        met.clear()
        policy.embed_codes(torch.zeros((1, 1), dtype=torch.long, device=weight.device))
    for hook in hooks:
        hook.remove()
    return head, sum(met)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum({id(p): p.numel() for p in parameters}.values())


def _linear(module: Any) -> int:
    return sum(child.weight.numel() for child in module.modules() if isinstance(child, nn.Linear))
