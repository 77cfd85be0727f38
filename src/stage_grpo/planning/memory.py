"""Memory of one GPU, component by component. Every formula is written out in ``docs/distributed.md``.

The rollout's part uses the engine's own estimates, so that the plan and the run agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from stage_grpo.planning.setting import Setting
from stage_grpo.rollout import bytes_per_row

ALWAYS = "always"
PHASES = ("rollout", "decoding", "scoring", "update", "optimizer step")
"""What a step does one after the other: the peak is what is always there and the largest of these."""

RESERVE = 4e9
"""Bytes for the CUDA context, NCCL's buffers, cuBLAS's workspaces and fragmentation: a guess, not a measurement."""

# The values of configs/deepspeed/*.json that take memory; a test compares.
REDUCE_BUCKET = 4096 * 4096
MAX_LIVE_PARAMETERS = 1_000_000_000
SUB_GROUP = 1_000_000_000

REWARD_PARAMETERS = {
    "geneval": 68_740_000 + 427_620_000,  # Mask2Former Swin-S, CLIP ViT-L/14
    "hps": 986_110_000,  # CLIP ViT-H/14
    "gdino": 172_250_000,  # GroundingDINO Swin-T
    "git": 394_200_000,  # GIT large
}
"""Weights of the reward models that are known by name, from their model cards."""


@dataclass(frozen=True)
class Component:
    """One line of the table.

    Attributes:
        name: What takes the memory.
        size: Bytes on each GPU.
        phase: ``always`` or one of ``PHASES``.
        how: The arithmetic, in words.
    """

    name: str
    size: int
    phase: str
    how: str


def components(run: Setting) -> list[Component]:
    """Everything that takes memory on one GPU."""
    always = [*_states(run), *_reference(run), *_rewards(run), Component("reserve", int(RESERVE), ALWAYS, "a guess")]
    always = [part for part in always if part.size]
    free = run.gpu_bytes - sum(part.size for part in always)
    parts = [*always, *_rollout(run, free), *_scoring(run), *_update(run), *_optimizer_step(run)]
    return [part for part in parts if part.size]


def peak(parts: list[Component]) -> tuple[int, str]:
    """Largest sum of what is there at one time, and the phase it belongs to."""
    always = sum(part.size for part in parts if part.phase == ALWAYS)
    sums = {phase: sum(part.size for part in parts if part.phase == phase) for phase in PHASES}
    largest = max(sums, key=lambda phase: sums[phase])
    return always + sums[largest], largest


def training_bytes(run: Setting, is_loaded: bool = False) -> int:
    """Bytes that training adds to one GPU: weights and what belongs to them, and the most that a pass or step takes.

    Rewards are left out, and the rollout, which takes a share of whatever is free.

    Args:
        run: The run.
        is_loaded: Whether the policy's weights are there already.
    """
    kept = [part for part in (*_states(run), *_reference(run)) if not (is_loaded and part.name == "policy weights")]
    return peak([*kept, *_scoring(run), *_update(run), *_optimizer_step(run)])[0]


def host_bytes(run: Setting) -> int:
    """Bytes that all processes of a run together keep in the memory of their machines."""
    averages = 4 * run.trainable if run.config.ema_decay is not None else 0
    if not run.is_sharded and not run.is_zero:
        averages *= run.num_gpus
    if run.parallel != "zero3_offload":
        return averages
    reference = run.sizes.total * run.low if run.has_reference else 0
    # 16-bit weights of policy and reference; float32 master, its gradient and Adam's two moments.
    return averages + run.low * (run.trainable + run.frozen) + 16 * run.trainable + reference


def _states(run: Setting) -> list[Component]:
    """Weights, gradients and optimizer states, which stay from beginning to end."""
    weights = run.trainable * run.trainable_bytes + run.frozen * run.frozen_bytes
    how = f"{run.trainable:,} x {run.trainable_bytes} + {run.frozen:,} frozen x {run.frozen_bytes}"
    if run.is_sharded:
        weights = run.share(run.trainable) * run.trainable_bytes + run.share(run.frozen) * run.frozen_bytes
        how = f"({how}) / {run.num_gpus}"
    if run.parallel == "zero3_offload":
        return []
    if run.is_zero or run.parallel == "fsdp2":
        own = run.share(run.trainable)
        state = 12 if run.is_zero else 8
        master = "float32 master and Adam's two moments" if run.is_zero else "Adam's two moments"
        return [
            Component("policy weights", weights, ALWAYS, how),
            Component("gradients", own * run.trainable_bytes, ALWAYS, f"{own:,} x {run.trainable_bytes}"),
            Component("optimizer", own * state, ALWAYS, f"{own:,} x {state}: {master}"),
        ]
    size = run.trainable * run.trainable_bytes
    count = f"{run.trainable:,} x {run.trainable_bytes}"
    return [
        Component("policy weights", weights, ALWAYS, how),
        Component("gradients", size, ALWAYS, count),
        Component("gradient buckets of DDP", size if run.num_gpus > 1 else 0, ALWAYS, count),
        Component("optimizer", 2 * size, ALWAYS, f"{count} x 2: Adam's two moments"),
    ]


def _reference(run: Setting) -> list[Component]:
    if not run.has_reference or run.parallel == "zero3_offload":
        return []
    count = run.share(run.sizes.total) if run.is_sharded else run.sizes.total
    return [Component("reference policy", count * run.frozen_bytes, ALWAYS, f"{count:,} x {run.frozen_bytes}")]


def reward_bytes(run: Setting) -> int:
    """Bytes of the reward models that are known by name, on each GPU."""
    return 4 * sum(_known_rewards(run).values())


def _known_rewards(run: Setting) -> dict[str, int]:
    return {name: REWARD_PARAMETERS[name] for name in run.config.rewards or [] if name in REWARD_PARAMETERS}


def _rewards(run: Setting) -> list[Component]:
    how = " + ".join(f"{name} {count / 1e6:,.0f} M" for name, count in _known_rewards(run).items()) + ", x 4"
    return [Component("reward models", reward_bytes(run), ALWAYS, how)]


def _whole_copy(run: Setting, phase: str) -> Component:
    """All weights on one GPU, gathered for a phase."""
    is_spread = run.parallel == "zero3_offload" or (run.is_sharded and run.num_gpus > 1)
    size = run.sizes.total * run.low if is_spread else 0
    return Component("gathered weights", size, phase, f"{run.sizes.total:,} x {run.low}")


def _cast_copy(run: Setting, phase: str) -> Component:
    """Autocast keeps a 16-bit copy of every float32 weight that is trained."""
    needed = run.mixed and not run.is_zero and run.parallel != "fsdp2" and run.trainable_bytes == 4
    return Component("16-bit copies", 2 * run.trainable * needed, phase, f"{run.trainable:,} x 2: autocast")


def _rollout(run: Setting, free: float) -> list[Component]:
    policy: Any = run.sizes.policy
    gathered, cast = _whole_copy(run, "rollout"), _cast_copy(run, "rollout")
    config = run.config
    # As rollout.memory_budget on a GPU: half of what is free when the rollout begins.
    budget = config.rollout_memory_gb * 1e9 if config.rollout_memory_gb else (free - gathered.size - cast.size) / 2
    rows = run.num_rollout_rows
    row = bytes_per_row(policy, run.num_prompt_tokens, config.guidance_scale != 1)
    chunk = rows_in_chunk(rows, budget, row)
    image = policy.decode_bytes_per_image
    decoded = rows_in_chunk(rows, budget, image)
    return [
        gathered,
        cast,
        Component("cache and logits", chunk * row, "rollout", f"{chunk} of {rows} images x {row / 1e6:,.1f} MB"),
        _whole_copy(run, "decoding"),
        Component("VQ decoder", decoded * image, "decoding", f"{decoded} of {rows} images x {image / 1e6:,.1f} MB"),
    ]


def rows_in_chunk(num_rows: int, budget: float, row_bytes: int) -> int:
    """Rows that the rollout takes at once, by its own rule: the fewest chunks that fit, of nearly equal size."""
    chunks = math.ceil(num_rows / max(1, int(budget // row_bytes)))
    return math.ceil(num_rows / chunks)


def layer_bytes(run: Setting) -> int:
    """Bytes that one layer of the language model keeps for its backward pass, in one micro-batch.

    Of a token: at each norm the input in float32 and a root; queries, keys, values, attention and a float32 sum a
    head; gate, activated gate and up projection. What is trained keeps its inputs besides: the norms and linear
    layers, or the adapters.
    """
    text, low, rank = run.sizes.text, run.low, run.config.lora_r
    hidden, inner, width = text.hidden_size, text.intermediate_size, run.sizes.attention_width
    keys = text.num_key_value_heads * run.sizes.head_dim
    size = 2 * (4 * hidden + 4) + low * (2 * width + 2 * keys) + 4 * text.num_attention_heads + 3 * low * inner
    if run.config.use_peft:
        # Each adapter casts its input by itself, and keeps its low-rank product.
        return run.scored_tokens * (size + low * (5 * hidden + width + inner + 7 * rank))
    # Autocast casts the input of each of the five linear layers behind a norm by itself; otherwise two share one.
    inputs = 5 if run.stream > low else 2
    return run.scored_tokens * (size + 2 * run.stream * hidden + low * (inputs * hidden + inner))


def _live(run: Setting, phase: str) -> list[Component]:
    """Weights that are gathered for the layers at work."""
    sizes = run.sizes
    if run.is_zero and run.is_sharded:
        count = min(MAX_LIVE_PARAMETERS, sizes.total)
        return [Component("gathered weights", run.low * count, phase, f"{count:,} x {run.low}: DeepSpeed's limit")]
    if run.parallel != "fsdp2":
        return [_cast_copy(run, phase)]
    if phase == "scoring":  # TRL shards the reference as one unit
        return [_whole_copy(run, phase)]
    count = sizes.total - (sizes.text.num_hidden_layers - 2) * sizes.layer
    return [
        Component(
            "gathered weights", run.low * count, phase, f"{count:,} x {run.low}: what is no layer, and two layers"
        )
    ]


def _head(run: Setting, phase: str) -> list[Component]:
    """The fused head: float32 features (with their gradient), float32 weights, one tile of logits."""
    weight = run.sizes.policy.get_output_embeddings().weight
    tokens = run.config.per_device_train_batch_size * run.sizes.policy.num_image_tokens
    copies = 2 if phase == "update" else 1
    features = 4 * tokens * weight.shape[1] * copies
    tile = 4 * min(tokens, TOKEN_CHUNK_SIZE) * _CHUNKED_LOGPROB_CHUNK_SIZE
    each = f"{copies} x " if copies > 1 else ""
    how = f"({each}{tokens:,} x {weight.shape[1]:,} + {weight.numel():,} + {tile // 4:,} logits) x 4"
    return [Component("image head and logits", features + 4 * weight.numel() + tile, phase, how)]


def _scoring(run: Setting) -> list[Component]:
    if run.config.beta == 0:
        return []
    working = Component("activations", layer_bytes(run), "scoring", "one layer of one micro-batch")
    return [*_live(run, "scoring"), working, *_head(run, "scoring")]


def _update(run: Setting) -> list[Component]:
    layer, layers = layer_bytes(run), run.sizes.text.num_hidden_layers
    stream = run.scored_tokens * run.sizes.text.hidden_size * run.stream
    if run.config.gradient_checkpointing:
        kept, how = layers * stream, f"{layers} layers' inputs of {run.scored_tokens:,} tokens"
    else:
        kept, how = (layers - 1) * layer, f"{layers - 1} layers of {run.scored_tokens:,} tokens"
    parts = [
        *_live(run, "update"),
        Component("activations kept", kept, "update", how),
        Component("activations of the layer at work", 2 * layer, "update", "what it keeps, and as much in gradients"),
        *_head(run, "update"),
    ]
    if run.is_zero or run.parallel == "fsdp2":
        largest = 0 if run.config.use_peft else run.sizes.largest
        bucket = max(REDUCE_BUCKET if run.is_zero else 0, largest)
        how = f"{bucket:,} x {run.low}: the bucket or the largest parameter"
        parts.append(Component("gradients on their way", bucket * run.low, "update", how))
    return parts


def _optimizer_step(run: Setting) -> list[Component]:
    """DeepSpeed's optimizer copies gradients to float32, a group of parameters at a time; others need nothing."""
    if not run.is_zero or run.parallel == "zero3_offload":
        return []
    own = run.share(run.trainable)
    count = min(own, SUB_GROUP) if run.parallel == "zero3" else own
    return [Component("float32 gradients", 4 * count, "optimizer step", f"{count:,} x 4")]
