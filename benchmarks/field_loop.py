"""Sampling as public training codes of the field write it, and as transformers does, to compare the rollout with.

``published_loop`` does what public trainers (T2I-R1, STAGE) do, in our words: every sample is prefilled, twice (the
guidance pair stands next to each other), prompts are padded to the longest, the cache grows by concatenation, batches
are split at 32 rows, both rows go through the head, the guided logits of every step are kept until the end,
`torch.multinomial` draws. Padding and positions are done right, as ours are, which costs next to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from stage_grpo.policy.base import ImagePolicy, left_pad

ROWS_AT_A_TIME = 32
"""Rows of a split, both guidance branches counted, so 16 images."""


@torch.no_grad()
def published_loop(policy: ImagePolicy, prompt_ids: list[list[int]], guidance_scale: float) -> Tensor:
    """Codes (B, T), drawn by torch's global generator."""
    ids, mask = (x.to(policy.device) for x in left_pad(prompt_ids, policy.pad_token_id))
    pairs = torch.repeat_interleave(ids, 2, dim=0)
    pairs[1::2] = policy.unconditional_ids(ids, mask)
    masks = torch.repeat_interleave(mask, 2, dim=0)
    embeddings = policy.embed_text(pairs)
    kept: list[Tensor] = []
    drawn = []
    for start in range(0, len(embeddings), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        drawn.append(_split(policy, embeddings[rows], masks[rows], guidance_scale, kept))
    return torch.cat(drawn)


def _split(policy: ImagePolicy, embeddings: Tensor, mask: Tensor, guidance_scale: float, kept: list[Tensor]) -> Tensor:
    cache = DynamicCache(config=policy.backbone.config)
    codes = torch.zeros((len(embeddings) // 2, policy.num_image_tokens), dtype=torch.long, device=policy.device)
    for t in range(policy.num_image_tokens):
        position_ids = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -embeddings.shape[1] :]
        outputs = policy.backbone(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        logits = policy.get_output_embeddings()(policy.project(outputs.last_hidden_state[:, -1, :]))
        conditional, unconditional = logits[0::2], logits[1::2]
        logits = unconditional + guidance_scale * (conditional - unconditional)
        kept.append(logits)
        next_codes = torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)
        codes[:, t] = next_codes.squeeze(dim=-1)
        embeddings = policy.embed_codes(torch.cat([next_codes, next_codes], dim=1).view(-1)[:, None])
        mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
    return codes


def transformers_generate(policy, prompt_ids: list[list[int]], guidance_scale: float) -> Tensor:
    """Codes (B, T) of transformers' own image generation, all rows in one batch."""
    ids, mask = (x.to(policy.device) for x in left_pad(prompt_ids, policy.pad_token_id))
    return policy.generate(
        inputs=ids,
        attention_mask=mask,
        generation_mode="image",
        do_sample=True,
        guidance_scale=guidance_scale,
        max_length=ids.shape[1] + policy.num_image_tokens,  # it allocates, and attends to, as many tokens
    )
