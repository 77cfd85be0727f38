"""A Llama backbone's prompts and decoding steps, written out for speed.

A rollout steps hundreds of times on a few rows, where the library's general step spends its time on Python, on
small products and on temporaries. Here the projections that share an input are one product, prompts of all lengths
are run together without padding, the image embedding with its aligner is a table, and the cache is filled in place.
Numbers differ from the library's by the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama as llama

from stage_grpo.devices import free_bytes
from stage_grpo.onednn_linear import OneDnnLinear
from stage_grpo.policy.adapted import adapters_function, base_layer, is_adapted, why_not_adapted
from stage_grpo.policy.decode_cache import DecodeCache, Decoder, KeysAndValues
from stage_grpo.policy.packed import LinearFunction, can_pack, linear_function

STATIC_ROPE = ("default", "linear", "llama3")
"""Rotary embeddings whose angles depend on the position alone."""
ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3")
"""Implementations of exact attention that the step's own may stand in for; who asks for ``eager`` wants to look on."""
COPY_SHARE = 0.25
"""Weights are copied into fused or packed ones if the copy takes at most this share of the memory."""


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    qkv: LinearFunction
    out: LinearFunction
    post_norm: Tensor
    gate_up: LinearFunction
    down: LinearFunction


class LlamaDecoder(Decoder):
    """The backbone on prompts, and its step for one image token a row up to the inputs of the image head's last layer.

    It holds copies or views of the weights as they are when it is built, so it serves one rollout. Under autocast the
    linear layers work in autocast's dtype and the residual stream in the dtype of the weights, as in training.

    Args:
        backbone: A backbone for which :func:`why_not` has nothing to say.
        table: Embedding of every code, as the backbone reads it.
        projection: First layer of the image head.
        activation: What stands between the two layers of the image head.
        head: The last layer of the image head.
        capacity: Largest number of positions of a sequence.
    """

    def __init__(
        self,
        backbone: Any,
        table: Float[Tensor, "V H"],
        projection: nn.Linear,
        activation: Callable[[Tensor], Tensor],
        head: nn.Linear,
        capacity: int,
    ):
        config = backbone.config
        self.head_dim = backbone.layers[0].self_attn.head_dim
        self.num_heads, self.num_key_heads = config.num_attention_heads, config.num_key_value_heads
        self.intermediate_size = config.intermediate_size
        self.eps = config.rms_norm_eps
        weight = backbone.layers[0].mlp.down_proj.weight
        device = weight.device.type
        self._autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.dtype = self._autocast or weight.dtype
        self.table = table.to(weight.dtype)
        self.final_norm = backbone.norm.weight.detach()
        places = torch.arange(capacity, device=weight.device)[None]
        cos, sin = backbone.rotary_emb(self.table[:1, None], position_ids=places)
        # The sine takes the sign of the half that it multiplies, see _rotate.
        half = self.head_dim // 2
        self.cos, self.sin = cos[0, :, None], torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], dim=-1)
        copies = _copies_fit(backbone, self.dtype)
        self.layers = [self._layer(layer, copies) for layer in backbone.layers]
        self.activation = activation
        self.projection = _copied(projection, self.dtype)
        self.head = _copied(head, torch.float32)

    def _layer(self, layer: Any, copies: bool) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            input_norm=layer.input_layernorm.weight.detach(),
            qkv=self._joined([attention.q_proj, attention.k_proj, attention.v_proj], copies),
            out=self._joined([attention.o_proj], copies),
            post_norm=layer.post_attention_layernorm.weight.detach(),
            gate_up=self._joined([mlp.gate_proj, mlp.up_proj], copies),
            down=self._joined([mlp.down_proj], copies),
        )

    def _joined(self, parts: list[Any], copies: bool) -> LinearFunction:
        """One function for linear layers that share their input: one product where copies of weights fit."""
        joined = self._joined_bases([base_layer(part) for part in parts], copies)
        adapters = adapters_function(parts, self._autocast)
        return joined if adapters is None else lambda x: (joined(x) + adapters(x)).to(self.dtype)

    def _joined_bases(self, parts: list[nn.Linear], copies: bool) -> LinearFunction:
        weights = [part.weight.detach().to(self.dtype) for part in parts]
        if copies:
            return linear_function(weights[0] if len(weights) == 1 else torch.cat(weights))
        return lambda x: torch.cat([nn.functional.linear(x, weight) for weight in weights], dim=-1)

    def prefill(
        self, prompts: Sequence[Float[Tensor, "_ _ H"]]
    ) -> list[tuple[list[KeysAndValues], Float[Tensor, "_ H"]]]:
        """As :class:`Decoder` says; linear layers see all tokens at once, attention those of prompts of one length."""
        shapes = [prompt.shape[:2] for prompt in prompts]
        sizes = [shape.numel() for shape in shapes]
        x = torch.cat([prompt.flatten(0, 1) for prompt in prompts])
        places = torch.cat([torch.arange(length, device=x.device).repeat(number) for number, length in shapes])
        cos, sin = self.cos[places], self.sin[places]
        caches: list[list[KeysAndValues]] = [[] for _ in prompts]
        with torch.autocast(x.device.type, enabled=False):
            for layer in self.layers:
                heads = [part.split(sizes) for part in self._heads(layer, x, cos, sin)]
                attended = []
                for cache, shape, *parts in zip(caches, shapes, *heads):
                    queries, keys, values = (part.unflatten(0, shape).transpose(1, 2) for part in parts)
                    out = nn.functional.scaled_dot_product_attention(
                        queries, keys, values, is_causal=True, enable_gqa=self.num_heads != self.num_key_heads
                    )
                    cache.append((keys, values))
                    attended.append(out.transpose(1, 2).reshape(shape.numel(), -1))
                x = self._after_attention(layer, x, torch.cat(attended))
            last = [part.unflatten(0, shape)[:, -1] for part, shape in zip(x.split(sizes), shapes)]
            return [(cache, rms_norm(hidden, self.final_norm, self.eps)) for cache, hidden in zip(caches, last)]

    def step(self, codes: Int[Tensor, " B"], cache: DecodeCache) -> Float[Tensor, "R E"]:
        """Feed one code a row, in all branches, and return the inputs of the head's last layer.

        Args:
            codes: Code of each image.
            cache: Cache, to which this token is added; the caller advances it.
        """
        with torch.autocast(codes.device.type, enabled=False):
            positions = cache.positions
            cos, sin = (x[positions].repeat(cache.num_branches, 1, 1) for x in (self.cos, self.sin))
            x = self.table[codes].repeat(cache.num_branches, 1)
            for i, layer in enumerate(self.layers):
                queries, keys, values = self._heads(layer, x, cos, sin)
                out = cache.attend(i, queries.unflatten(1, (self.num_key_heads, -1)), keys, values)
                x = self._after_attention(layer, x, out.flatten(1))
            return self.features(rms_norm(x, self.final_norm, self.eps))

    def features(self, hidden: Float[Tensor, "R H"]) -> Float[Tensor, "R E"]:
        """Inputs of the head's last layer, from the backbone's last hidden states."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.activation(self.projection(hidden.to(self.dtype)))

    def logits(self, features: Float[Tensor, "n E"]) -> Float[Tensor, "n V"]:
        """Logits over the codebook in float32, whatever the dtype of the weights."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.eps).to(self.dtype)

    def _heads(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of each token, (R, heads, d), the first two rotated."""
        heads = layer.qkv(self._norm(x, layer.input_norm)).unflatten(-1, (-1, self.head_dim))
        rotating, values = heads.split([self.num_heads + self.num_key_heads, self.num_key_heads], dim=1)
        rotated = _rotate(rotating, cos, sin).to(self.dtype)
        queries, keys = rotated.split([self.num_heads, self.num_key_heads], dim=1)
        return queries, keys, values

    def _after_attention(self, layer: _Layer, x: Float[Tensor, "R H"], attended: Tensor) -> Float[Tensor, "R H"]:
        """The rest of a layer."""
        x = x + layer.out(attended).to(x.dtype)
        gate, up = layer.gate_up(self._norm(x, layer.post_norm)).chunk(2, dim=-1)
        return x + layer.down(nn.functional.silu(gate) * up).to(x.dtype)


def rms_norm(x: Float[Tensor, "R H"], weight: Float[Tensor, " H"], eps: float) -> Float[Tensor, "R H"]:
    """Root-mean-square norm, rounded where the library rounds."""
    if x.dtype == torch.float32:
        return nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    return weight * nn.functional.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype)


def _copied(layer: nn.Linear, dtype: torch.dtype) -> LinearFunction:
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    return linear_function(layer.weight.detach().to(dtype), bias)


def _rotate(x: Float[Tensor, "R h d"], cos: Float[Tensor, "R 1 d"], sin: Float[Tensor, "R 1 d"]) -> Tensor:
    """Rotary embedding; swapping the halves by a roll needs no negated copy, as the sine has the sign."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def why_not(backbone: Any, modules: tuple[nn.Module, ...] = ()) -> str | None:
    """Say why a backbone is none that :class:`LlamaDecoder` understands, or return None.

    Anything that changes what a plain Llama computes has to show here: adapters other than plain LoRA, quantised or
    parametrised layers, sharded weights, hooks, patched methods, options of the config.

    Args:
        backbone: The language model.
        modules: Other modules that a decoder would read instead of calling.
    """
    if _class(backbone) is not llama.LlamaModel:
        return f"the backbone is a {type(backbone).__name__}"
    config: Any = backbone.config
    wanted = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
    for name, values in (wanted | {"_attn_implementation": ATTENTION}).items():
        if getattr(config, name, None) not in values:
            return f"{name} is {getattr(config, name, None)!r}"
    rope = config.rope_parameters.get("rope_type")
    if rope not in STATIC_ROPE or config.rope_parameters.get("partial_rotary_factor", 1) != 1:
        return f"the rotary embedding is {rope!r} with {config.rope_parameters}"
    if len(backbone.layers) != config.num_hidden_layers:
        return f"{len(backbone.layers)} layers stand where the config says {config.num_hidden_layers}"
    for module in (backbone, *modules):
        for name, part in module.named_modules():
            if reason := _why_not_part(part, adapters=module is backbone):
                return f"{name or type(module).__name__}: {reason}"
    devices = {(p.device, p.dtype) for name, p in backbone.layers.named_parameters() if ".lora_" not in name}
    return None if len(devices) == 1 else f"weights are spread over {sorted(map(str, devices))}"


_PLAIN = (
    llama.LlamaModel,
    llama.LlamaDecoderLayer,
    llama.LlamaAttention,
    llama.LlamaMLP,
    llama.LlamaRMSNorm,
    llama.LlamaRotaryEmbedding,
    nn.Linear,
    OneDnnLinear,
    nn.Embedding,
    nn.ModuleList,
    nn.ModuleDict,  # these hold PEFT's adapters
    nn.ParameterDict,
    nn.Identity,
    nn.Dropout,
)


def _class(module: nn.Module) -> type:
    """The class as written: FSDP2 puts a subclass in its place."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def _why_not_part(part: Any, adapters: bool) -> str | None:
    """Why one module is not what its class says."""
    kind = _class(part)
    if adapters and is_adapted(part):
        if reason := why_not_adapted(part):
            return reason
    elif kind not in _PLAIN and not (kind.__module__ in _TRUSTED and not list(part.parameters(False))):
        return f"it is a {type(part).__module__}.{type(part).__qualname__}"
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    if any(getattr(hook, "__qualname__", None) not in _HARMLESS_HOOKS for hook in hooks) or "forward" in vars(part):
        return "it has a hook or a patched forward"
    for name, parameter in part.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            return f"{name} is a {type(parameter).__name__} on {parameter.device}"
    expected = (part.out_features, part.in_features) if isinstance(part, nn.Linear) else None
    if expected and part.weight.shape != expected:
        return f"weight has shape {tuple(part.weight.shape)} instead of {expected}: it is sharded or packed"
    return None


_HARMLESS_HOOKS = (
    # What checkpointing of activations puts on embeddings leaves them as they are.
    f"{PreTrainedModel.enable_input_require_grads.__qualname__}.<locals>.make_inputs_require_grads",
    # FSDP2 gathers weights; those that are not gathered already show as shards.
    "FSDPState._pre_forward",
    "FSDPState._post_forward",
)
_TRUSTED = ("torch.nn.modules.activation", "transformers.activations", "transformers.models.janus.modeling_janus")
"""Where activations come from, and modules that only hold others."""


def _copies_fit(backbone: Any, dtype: torch.dtype) -> bool:
    """Whether fused, packed or cast copies of all layers may be made."""
    parameters = list(backbone.layers.parameters())
    size = sum(p.numel() for p in parameters) * dtype.itemsize
    if dtype != parameters[0].dtype:
        return True  # Autocast would make and keep such copies as well.
    if not parameters[0].is_cuda and not can_pack(parameters[0]):
        return False  # Fused products alone gain little on a CPU.
    device = parameters[0].device
    # On a CPU the bits of a rollout must not depend on what else runs; on a GPU a copy too many would end the run.
    return size <= COPY_SHARE * (free_bytes(device) if parameters[0].is_cuda else psutil.virtual_memory().total)
