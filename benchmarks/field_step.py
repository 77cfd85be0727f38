"""A training step as the public codes of the field write it, in our words, to compare the trainer's step with.

After krennic999/STAGE (`grpo_trainer.py` at 579e5cf), whose loss this computes. What it does beyond need is kept and
tagged: D1 ranks of every image's tokens under every other image, by a loop, read by nobody; D2 the sampling loop of
field_loop.py; D3 hidden states of all layers, whole logits, and an entropy with a graph that no gradient flows back
through; D4 cosines of all pairs of images, one by one. The policy is scored first and its graph is held while the
reference is scored, images are decoded and rewards computed. Left out: a copy of every image on the disk and printing.

Padding and positions are done right, the reference reads its own text embeddings and not those of the policy that is
trained, and numbers stay float32, all as ours: the losses can then be compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from field_loop import published_loop
from stage_step import REWARDS, Meter, optimize, prompt_ids_of
from torch import Tensor

from stage_grpo.onednn_linear import OneDnnLinear
from stage_grpo.policy.base import ImagePolicy, left_pad, positions
from stage_grpo.rollout import decode_images
from stage_grpo.trainer import StageTrainer

TOP_K = 50
ENTROPY_REWARD_WEIGHT = 0.4


@dataclass(frozen=True)
class Scores:
    """What one model says of the images."""

    logps: Tensor
    entropies: Tensor
    ranks: Tensor


def score(policy: Any, embeddings: Tensor, mask: Tensor, codes: Tensor, meter: Meter, phase: str) -> Scores:
    """Log-probabilities and entropies (B, T), and the ranks (B, B, T)."""
    with meter.timed(phase):
        outputs = policy.backbone(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=False,
            output_hidden_states=True,  # D3
        )
        hidden = outputs.hidden_states
        logits = policy.get_output_embeddings()(policy.project(hidden[-1][:, -codes.shape[1] - 1 :, :]))
        logps, entropies = per_sample(logits[:, :-1, :], codes)
    with meter.timed("token ranks"):
        ranks = token_ranks(logits[:, :-1, :], codes)
    return Scores(logps, entropies, ranks)


def per_sample(logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    logps, entropies = [], []
    for logits_row, codes_row in zip(logits, codes):
        log_probs = logits_row.log_softmax(dim=-1)
        logps.append(torch.gather(log_probs, 1, codes_row.unsqueeze(1)).squeeze(1))
        probs = log_probs.exp()
        entropies.append(-(probs * log_probs).sum(dim=1))  # D3
        del log_probs, probs
    return torch.stack(logps), torch.stack(entropies)


def token_ranks(logits: Tensor, codes: Tensor) -> Tensor:
    """D1: place of image j's code t among the likeliest of image i's distribution there, -1 beyond the first 50."""
    num_images, num_tokens = codes.shape
    _, likeliest = torch.topk(logits, TOP_K, dim=-1)
    ranks = torch.full((num_images, num_images, num_tokens), -1, dtype=torch.long, device=logits.device)
    for i in range(num_images):
        for j in range(num_images):
            for t in range(num_tokens):
                code = codes[j, t].item()
                found = (likeliest[i, t] == code).nonzero(as_tuple=True)
                if len(found[0]) > 0:
                    ranks[i, j, t] = found[0].item()
    return ranks


def pairwise_similarity(vectors: Tensor, advantages: Tensor) -> Tensor:
    """D4: from code vectors (B, T, D), the mean cosine (B, T) to the images of opposite sign."""
    num_images, num_tokens, _ = vectors.shape
    total = torch.zeros((num_images, num_images, num_tokens), device=vectors.device)
    for i in range(num_images):
        for j in range(num_images):
            cosines = F.cosine_similarity(vectors[i], vectors[j], dim=1)
            if i != j:
                total[i, j] = cosines
    opposite = (advantages.view(-1, 1) * advantages.view(1, -1) <= 0).view(num_images, num_images, 1)
    return (total * opposite).sum(dim=1) / opposite.sum(dim=1)


@torch.no_grad()
def advantages_of(rewards: Tensor, policy_entropy: Tensor, ref_entropy: Tensor) -> Tensor:
    """The bonus of the best images, centred on their mean, then the whole batch as one group."""
    bonus = 1 / (1 + (ref_entropy - policy_entropy) ** 2)
    bonus = bonus * (rewards == rewards.max())
    mean = bonus[bonus != 0].mean()
    rewards = rewards + (bonus - torch.where(bonus != 0, mean, 0.0)) * ENTROPY_REWARD_WEIGHT
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def loss_of(own: Scores, reference: Scores, advantages: Tensor, similarity: Tensor, beta: float) -> Tensor:
    mask = ((1 - similarity) / 2).clamp(0, 1)
    surrogate = torch.exp(own.logps - own.logps.detach()) * advantages.unsqueeze(1)
    surrogate = (surrogate * (mask / (mask.sum() + 1e-6))).sum()
    kl = torch.exp(reference.logps - own.logps) - (reference.logps - own.logps) - 1
    kl = kl * (0.5 + (similarity + 1).clamp(0, 1) * 0.5)
    return (-(surrogate - beta * kl)).mean()


def embed(policy: ImagePolicy, prompt_ids: list[list[int]], codes: Tensor) -> tuple[Tensor, Tensor]:
    ids, mask = (x.to(policy.device) for x in left_pad(prompt_ids, policy.pad_token_id))
    embeddings = torch.cat([policy.embed_text(ids), policy.embed_codes(codes)], dim=1)
    return embeddings, policy.attention_mask_with_image(mask)


def roll_out(trainer: StageTrainer, meter: Meter) -> None:
    """D2. The images are thrown away: both sides train on the same ones."""
    policy = trainer.model.eval()
    with meter.timed("rollout"):
        published_loop(policy, prompt_ids_of(trainer), trainer.args.guidance_scale)
    policy.train()


@contextmanager
def pytorchs_products(*models: Any) -> Iterator[None]:
    """Linear layers as the library has them, where the trainer has put faster ones."""
    layers = [layer for model in models for layer in model.modules() if type(layer) is OneDnnLinear]
    for layer in layers:
        layer.__class__ = torch.nn.Linear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = OneDnnLinear


def field_step(trainer: StageTrainer, codes: Tensor, meter: Meter, with_rollout: bool = True) -> float:
    """A whole step on the images given as codes, with the trainer's models and optimizer; gives the loss.

    Without a rollout there is no decoding either, as in a trainer that was given its codes.
    """
    with pytorchs_products(trainer.model, trainer.ref_model):
        return _field_step(trainer, codes, meter, with_rollout)


def _field_step(trainer: StageTrainer, codes: Tensor, meter: Meter, with_rollout: bool) -> float:
    policy, reference = trainer.model, trainer.ref_model
    wall, cpu = time.perf_counter(), time.process_time()
    if with_rollout:
        roll_out(trainer, meter)
    trainer.optimizer.zero_grad()
    embeddings, mask = embed(policy, prompt_ids_of(trainer), codes)
    own = score(policy, embeddings, mask, codes, meter, "policy forward")
    with torch.inference_mode():
        ref_embeddings, _ = embed(reference, prompt_ids_of(trainer), codes)
        other = score(reference, ref_embeddings, mask, codes, meter, "reference")
    if with_rollout:
        with meter.timed("decode"):
            decode_images(policy, codes)
    with meter.timed("reward"):
        rewards = torch.tensor([REWARDS[i % len(REWARDS)] for i in range(len(codes))], device=codes.device)
    with meter.timed("token weights"):
        advantages = advantages_of(rewards, own.entropies.mean(dim=1), other.entropies.mean(dim=1))
        similarity = pairwise_similarity(policy.code_vectors(codes), advantages)
    with meter.timed("policy forward"):
        loss = loss_of(own, other, advantages, similarity, trainer.beta)
    with meter.timed("backward"):
        loss.backward()
    optimize(trainer, meter)
    meter.wall["step"] = time.perf_counter() - wall
    meter.cpu["step"] = time.process_time() - cpu
    return loss.item()
