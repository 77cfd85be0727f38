"""Supervised training of the tiny policy's language model on captioned scenes, as image codes.

Left alone, so small a model learns to draw and ignores the caption: four fifths of an image is background, and
where a shape goes is a coin toss no caption helps with. Three things make it listen: tokens on shapes weigh more at
first (and as much as any other at the end, since the weight also makes shapes too likely), early captions are
mostly about colour, and matrices are trained by Muon.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.models.janus.modeling_janus import JanusVQVAE

from stage_grpo.policy.base import ImagePolicy, left_pad
from stage_grpo.policy.janus import JanusPolicy
from stage_grpo.shapes.pretrain_config import PretrainConfig
from stage_grpo.shapes.prompts import CATEGORIES, rows_of, sample_scene
from stage_grpo.shapes.scenes import PATCH_SIZE
from stage_grpo.shapes.tokenizer_training import encode, foreground_weight, to_pixels
from stage_grpo.shapes.training_state import learning_rate_factor, load_state, save_state
from stage_grpo.types import PromptRow

EARLY_MIX = {
    "single_object": 0.15,
    "two_object": 0.1,
    "counting": 0.15,
    "colors": 0.4,
    "position": 0.1,
    "color_attr": 0.1,
}
"""Share of each category's captions in the first steps."""
MIX = {
    "single_object": 0.05,
    "two_object": 0.1,
    "counting": 0.2,
    "colors": 0.1,
    "position": 0.3,
    "color_attr": 0.25,
}
"""Share of each category's captions once `_EARLY_SHARE` of the run is over: the hard ones lead."""
_EARLY_SHARE = 0.15
_CAPTION_DROPOUT = 0.1
_ENCODE_BATCH = 64
_WARMUP = 100
_PLATEAU = 0.5
_EMA_DECAY = 0.998
_STREAM = 2
_SCENE_STREAM = 3


@dataclass(frozen=True)
class EncodedScenes:
    """Captioned scenes of one category, as image codes.

    Attributes:
        codes: image codes in reading order.
        foreground: whether a token's patch shows part of a shape.
        captions: index of each scene's row in `rows_of(category, "train")`.
    """

    codes: Int[Tensor, "num T"]
    foreground: Bool[Tensor, "num T"]
    captions: Int[Tensor, " num"]


@torch.no_grad()
def encode_scenes(vqmodel: JanusVQVAE, category: str, num_scenes: int, seed: int) -> EncodedScenes:
    """Draw training captions of a category, render a scene for each and encode it.

    Args:
        vqmodel: a trained image tokenizer.
        category: one of `CATEGORIES`.
        num_scenes: how many.
        seed: with the category, the only source of randomness.

    Raises:
        ValueError: unknown category.
    """
    prompts = rows_of(category, "train")
    rng = np.random.default_rng((seed, _SCENE_STREAM, CATEGORIES.index(category)))
    chosen = rng.integers(0, len(prompts), num_scenes)
    codes, foreground = [], []
    for start in range(0, num_scenes, _ENCODE_BATCH):
        batch = chosen[start : start + _ENCODE_BATCH]
        pixels = to_pixels([sample_scene(prompts[i], rng) for i in batch])
        codes.append(encode(vqmodel, pixels).to(torch.int16))
        shape = F.max_pool2d(foreground_weight(pixels, 2.0, margin=0), PATCH_SIZE) > 1
        foreground.append(shape.flatten(1))
    return EncodedScenes(torch.cat(codes), torch.cat(foreground), torch.from_numpy(chosen))


def encoded_training_set(vqmodel: JanusVQVAE, config: PretrainConfig, file: Path) -> dict[str, EncodedScenes]:
    """The training set by category, read from `file` or made and written there."""
    if not file.exists():
        sets = {}
        for tag in tqdm(CATEGORIES, "encoding"):
            num_scenes = max(1, round(MIX[tag] * config.num_scenes))
            made = encode_scenes(vqmodel, tag, num_scenes, config.seed)
            sets |= {f"{tag}.{name}": value for name, value in vars(made).items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".new")
        save_file(sets, fresh)
        fresh.replace(file)
    sets = load_file(file)
    names = ("codes", "foreground", "captions")
    return {tag: EncodedScenes(**{name: sets[f"{tag}.{name}"] for name in names}) for tag in CATEGORIES}


def policy_loss(
    policy: ImagePolicy,
    prompt_ids: Int[Tensor, "B P"],
    attention_mask: Int[Tensor, "B P"],
    codes: Int[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
) -> Float[Tensor, ""]:
    """Weighted mean cross-entropy of image codes given prompts, in nats a token.

    Args:
        policy: the policy, whose conditional branch is trained.
        prompt_ids: left-padded prompts, the last token beginning the image.
        attention_mask: 1 for tokens of a prompt, 0 for padding.
        codes: target codes.
        weights: of each token's loss.
    """
    mask = policy.attention_mask_with_image(attention_mask)[:, :-1]
    hidden = policy.hidden_states(prompt_ids, codes[:, :-1], mask)
    logits = policy.image_logits(policy.project(hidden))
    losses = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view_as(weights)
    return (losses * weights).sum() / weights.sum()


class BatchSampler:
    """Draws training batches: categories by the current mix, captions dropped now and then."""

    def __init__(self, policy: ImagePolicy, tokenizer: Any, sets: dict[str, EncodedScenes]) -> None:
        self.policy, self.sets = policy, sets
        captions: dict[str, list[PromptRow]] = {tag: rows_of(tag, "train") for tag in CATEGORIES}
        self.tokens = {
            tag: policy.encode_prompts(tokenizer, [row.prompt for row in prompts]) for tag, prompts in captions.items()
        }

    def sample(
        self, rng: np.random.Generator, batch_size: int, progress: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Prompt ids (B, P), attention mask (B, P), codes (B, T) and foreground mask (B, T) of one batch."""
        mix = EARLY_MIX if progress < _EARLY_SHARE else MIX
        tags = rng.choice(CATEGORIES, batch_size, p=[mix[tag] for tag in CATEGORIES])
        tokens, codes, foreground = [], [], []
        for tag in tags:
            scenes = self.sets[tag]
            i = int(rng.integers(len(scenes.codes)))
            tokens.append(self.tokens[tag][int(scenes.captions[i])])
            codes.append(scenes.codes[i])
            foreground.append(scenes.foreground[i])
        ids, mask = left_pad(tokens, self.policy.pad_token_id)
        dropped = torch.from_numpy(rng.random(batch_size) < _CAPTION_DROPOUT)[:, None]
        ids = torch.where(dropped, self.policy.unconditional_ids(ids, mask), ids)
        return ids, mask, torch.stack(codes).long(), torch.stack(foreground)


def train_policy(policy: JanusPolicy, tokenizer: Any, config: PretrainConfig, folder: Path) -> float:
    """Train a policy in place with its image tokenizer frozen; it ends with the moving average of its weights.

    Resumes from `folder` where an earlier run left off, and ends as an undisturbed run would.

    Returns:
        Seconds spent training, in all runs together.

    Raises:
        ValueError: an unreadable checkpoint.
    """
    sets = encoded_training_set(policy.model.vqmodel, config, folder.parent / "scenes.safetensors")
    parameters = _select_parameters(policy)
    average = {name: p.detach().clone() for name, p in parameters.items()}
    optimizers = _build_optimizers(parameters, config)
    start, seconds = _resume(folder, parameters, average, optimizers)
    began = time.monotonic() - seconds
    sampler = BatchSampler(policy, tokenizer, sets)
    progress = tqdm(range(start, config.policy_steps), "policy", initial=start, total=config.policy_steps)
    for step in progress:
        done = step / config.policy_steps
        rng = np.random.default_rng((config.seed, _STREAM, step))
        ids, mask, codes, foreground = sampler.sample(rng, config.policy_batch_size, done)
        weights = 1.0 + (_foreground_weight(config.policy_foreground, done) - 1.0) * foreground
        with torch.autocast("cpu", torch.bfloat16, enabled=config.policy_bf16):
            loss = policy_loss(policy, ids, mask, codes, weights)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        _update(optimizers, learning_rate_factor(step, config.policy_steps, _WARMUP, _PLATEAU))
        decay = min(_EMA_DECAY, (step + 1) / (step + 10))
        for name, parameter in parameters.items():
            average[name].lerp_(parameter.detach(), 1 - decay)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % config.save_every == 0 or step + 1 == config.policy_steps:
            tensors = {f"policy.{n}": p for n, p in parameters.items()}
            tensors |= {f"average.{n}": p for n, p in average.items()}
            seconds = time.monotonic() - began
            state = {"step": step + 1, "seconds": seconds}
            save_state(folder, tensors, state | {"optimizers": [o.state_dict() for o in optimizers]})
    load_average(policy, average)
    return seconds


def load_average(policy: JanusPolicy, average: dict[str, Tensor]) -> None:
    """Give the policy the moving average of its weights."""
    for name, parameter in _select_parameters(policy).items():
        parameter.data.copy_(average[name])


def _select_parameters(policy: JanusPolicy) -> dict[str, nn.Parameter]:
    """What pretraining trains: the language model and the generation stack but the image tokenizer."""
    policy.requires_grad_(False)
    chosen = {}
    for name, parameter in policy.model.named_parameters():
        if not name.startswith(("vision_model.", "aligner.", "vqmodel.")):
            chosen[name] = parameter.requires_grad_(True)
    return chosen


def _build_optimizers(parameters: dict[str, nn.Parameter], config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the language model's blocks, AdamW for embeddings, heads and norms."""
    blocks = [p for name, p in parameters.items() if ".layers." in name and p.ndim == 2]
    rest = [p for name, p in parameters.items() if not (".layers." in name and p.ndim == 2)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(blocks, lr=config.policy_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=config.policy_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = config.policy_lr
    return optimizers


def _update(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """One step of every optimizer at its peak learning rate times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _resume(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
) -> tuple[int, float]:
    """Load the checkpoint in `folder`, if any; returns the steps and seconds that it took."""
    saved = load_state(folder)
    if saved is None:
        return 0, 0.0
    tensors, state = saved
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"policy.{name}"])
        average[name].copy_(tensors[f"average.{name}"])
    for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(stored)
    return state["step"], state["seconds"]


def _foreground_weight(peak: float, done: float) -> float:
    """Loss weight of tokens on shapes: from `peak` at the start, by a constant factor a step, to 1 at half time."""
    return peak ** max(0.0, 1.0 - 2.0 * done)
