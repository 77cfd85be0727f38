"""Teacher forcing of several images of one prompt, with the prompt run once.

In GRPO every prompt has a group of images. Keys and values of its tokens are the same for the whole group, so they are
computed for each *unique* prompt and read by every image after it: ``(B - U) * P`` of ``B * (P + T)`` positions are
saved, backward pass included. The gradients of a prompt's keys and values add up over its images, as they would over
copies.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache


def unique_prompts(
    input_ids: Int[Tensor, "B P"], attention_mask: Int[Tensor, "B P"]
) -> tuple[Int[Tensor, " U"], Int[Tensor, " B"]]:
    """One row of each unique prompt, and for every row which of these it equals.

    Args:
        input_ids: Left-padded prompts.
        attention_mask: 1 for tokens, 0 for padding; rows that differ in it alone are different prompts.
    """
    rows = torch.cat([input_ids, attention_mask], dim=1)
    unique, group = torch.unique(rows, dim=0, return_inverse=True)
    places = torch.arange(len(rows), device=rows.device)
    first = places.new_full((len(unique),), len(rows)).scatter_reduce_(0, group, places, "amin")
    return first, group


def hidden_states_of_groups(
    backbone: Any,
    prompt: Float[Tensor, "B P H"],
    codes: Float[Tensor, "B t H"],
    attention_mask: Int[Tensor, "B L"],
    position_ids: Int[Tensor, "B L"],
    first: Int[Tensor, " U"],
    group: Int[Tensor, " B"],
) -> Float[Tensor, "B n H"]:
    """As :meth:`~stage_grpo.policy.base.ImagePolicy.hidden_states`, where rows share their prompts.

    Args:
        backbone: The language model.
        prompt: Embedded prompts.
        codes: Embedded image codes.
        attention_mask: Of prompts and images.
        position_ids: The same.
        first: From :func:`unique_prompts`.
        group: From :func:`unique_prompts`.
    """
    num_prompt_tokens = prompt.shape[1]
    cache: Any = DynamicCache(config=backbone.config)
    before = backbone(
        inputs_embeds=prompt[first],
        attention_mask=attention_mask[first, :num_prompt_tokens],
        position_ids=position_ids[first, :num_prompt_tokens],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    for layer in cache.layers:
        # Not `keys[group]`: several threads would add up its gradients in an order that changes from run to run.
        layer.keys, layer.values = layer.keys.index_select(0, group), layer.values.index_select(0, group)
    after = backbone(
        inputs_embeds=codes,
        attention_mask=attention_mask,
        position_ids=position_ids[:, num_prompt_tokens:],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([before[:, -1:].index_select(0, group), after], dim=1)
