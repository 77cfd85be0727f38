"""TRL's fused head on an image policy: log-probabilities and entropies of codes, logits tile by tile.

``tests/test_trl_seams.py`` states what is relied on, and fails with a readable message when TRL changes it.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

from stage_grpo.policy.base import ImagePolicy

CPU_TOKENS_A_TILE = 128
"""Tokens whose logits are held at a time where no kernel folds them: TRL's 4,096 take several copies of 268 MB."""


def add_scoring_head(policy: ImagePolicy, temperature: float, device: torch.device) -> None:
    """Let a policy score codes as TRL's trainer asks: ``policy(ids, mask, labels=ids, fused_lm_head=True)``.

    Log-probabilities and entropies, (B, T), are of the image's tokens alone and in float32. TRL by itself would put
    prompts through the head too, and on a CPU mask them only then.

    Args:
        policy: The policy or the reference; its ``forward`` is exchanged.
        temperature: Divides the logits.
        device: Where it will run.
    """
    if device.type == "cpu":
        chunked_logprob.TOKEN_CHUNK_SIZE = CPU_TOKENS_A_TILE
    model: Any = policy
    add_fused_lm_head(model, temperature=temperature, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy"))
    score_all = model.forward.__func__

    @functools.wraps(score_all)
    def score_images(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if fused_lm_head:
            kwargs |= {"shift_labels": labels[:, -self.num_image_tokens :], "image_only": True}
            labels = None
        return score_all(self, *args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)

    model.forward = types.MethodType(score_images, model)
