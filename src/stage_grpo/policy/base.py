"""What the rollout and the trainer need of an autoregressive image model.

A family is one file: a subclass of its ``transformers`` model and of :class:`ImagePolicy` that fills in the
abstract members below. Everything else (guidance, positions, the fused-head seam, freezing) is written here once,
in their terms. ``docs/adding_a_model.md`` walks through one.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from stage_grpo.policy.decode_cache import Decoder
from stage_grpo.policy.shared_prompts import hidden_states_of_groups, unique_prompts


@dataclass(frozen=True)
class PromptTemplate:
    """Text around a prompt, up to the token that begins the image."""

    before: str
    after: str

    def __call__(self, prompt: str) -> str:
        """Return the prompt as the model was trained to read it."""
        return f"{self.before}{prompt}{self.after}"


PROMPT_TEMPLATES = {
    # DeepSeek's generation example.
    "janus": PromptTemplate("<|User|>: ", "\n\n<|Assistant|>:"),
    # What the T2I-R1 and STAGE code writes, and so what their checkpoints were trained on.
    "t2i_r1": PromptTemplate("User: ", "\n\nAssistant:"),
}


def left_pad(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Int[Tensor, "B P"], Int[Tensor, "B P"]]:
    """Stack token rows of different lengths, padded on the left.

    Returns:
        Token ids and the attention mask (1 for a token, 0 for padding), both int64.
    """
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.as_tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return ids, mask


def positions(attention_mask: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Position of each token in its own row, so that padding moves no token."""
    return (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: ``uncond + scale * (cond - uncond)``, of logits or of head features alike."""
    return torch.lerp(unconditional, conditional, guidance_scale)


class _ImageBackbone:
    """What TRL's fused head calls in place of the model: hidden states of the *image* head, not the text head."""

    def __init__(self, policy: ImagePolicy):
        self._policy = policy

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, image_only: bool = False, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        features = self._policy.head_features(input_ids, attention_mask)
        if not image_only:  # the head expects one place a token; nothing is scored where these zeros are
            before = input_ids.shape[1] - self._policy.num_image_tokens - 1
            features = nn.functional.pad(features, (0, 0, before, 1))
        return BaseModelOutputWithPast(last_hidden_state=features)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy.inner_model, name)


# Not abc.ABC: FSDP2 exchanges the class of a model for a subclass, which Python refuses where a base has slots.
class ImagePolicy(metaclass=abc.ABCMeta):
    """An autoregressive image model as the rollout and TRL's GRPO trainer see it.

    A sequence is P text tokens, left-padded, the last of which begins the image, followed by T image codes (plain
    codebook indices). Guidance: with :attr:`scoring_guidance` set, the scored distribution is the guided one; the
    last layer of the image head is linear, so mixing its inputs gives exactly the guided logits.
    """

    scoring_guidance: float | None = None
    """Guidance scale of the scored distribution; ``None`` scores the conditional branch alone, as published."""
    shares_prompts: bool = False
    """Whether scoring runs the prompt of a group once; needs whole weights and no gradient checkpointing."""

    config: Any
    device: torch.device
    training: bool
    eval: Any
    train: Any

    # ---- what a family provides -------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def inner_model(self) -> Any:
        """The module that owns the sub-models (``model`` in transformers)."""

    @property
    @abc.abstractmethod
    def backbone(self) -> Any:
        """The language model: ``backbone(inputs_embeds, attention_mask, position_ids, past_key_values)``."""

    @property
    @abc.abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""

    @property
    @abc.abstractmethod
    def image_size(self) -> int:
        """Height of an image in pixels."""

    @abc.abstractmethod
    def embed_text(self, input_ids: Int[Tensor, "B P"]) -> Float[Tensor, "B P H"]:
        """Embed prompt tokens."""

    @abc.abstractmethod
    def embed_codes(self, codes: Int[Tensor, "B t"]) -> Float[Tensor, "B t H"]:
        """Embed image codes as the language model reads them."""

    @abc.abstractmethod
    def project(self, hidden_states: Float[Tensor, "*n H"]) -> Float[Tensor, "*n E"]:
        """Everything of the image head but its last, linear layer."""

    @abc.abstractmethod
    def get_output_embeddings(self) -> nn.Linear:
        """The last, linear layer of the image head (E to V)."""

    @abc.abstractmethod
    def code_vectors(self, codes: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Codebook vectors of image tokens, in float32: what "these tokens look alike" is measured on."""

    @abc.abstractmethod
    def decode(self, codes: Int[Tensor, "B T"]) -> UInt8[Tensor, "B height width 3"]:
        """Turn codes into RGB images, 0 to 255."""

    @property
    @abc.abstractmethod
    def decode_bytes_per_image(self) -> int:
        """Estimate of the bytes that :meth:`decode` holds at its peak for one image."""

    @abc.abstractmethod
    def freeze(self) -> None:
        """Leave only the language model trainable."""

    def make_decoder(self, capacity: int) -> Decoder | None:
        """Build the family's own decoding step from the weights as they are now, if it has a faster one.

        ``None``, the default, lets the rollout call :attr:`backbone`, which is right for every model.

        Args:
            capacity: Largest number of positions of a sequence, prompt and image.
        """
        return None

    @property
    def default_guidance_scale(self) -> float | None:
        """Guidance the checkpoint was made to be sampled with, if its generation config says so."""
        return getattr(getattr(self, "generation_config", None), "guidance_scale", None)

    # ---- what is the same for all -----------------------------------------------------------------------------

    @property
    def num_image_tokens(self) -> int:
        """T: tokens of one image."""
        rows, columns = self.grid
        return rows * columns

    @property
    def pad_token_id(self) -> int:
        """Id that pads prompts and blanks the unconditional row.

        Raises:
            ValueError: If the checkpoint names none.
        """
        pad_token_id = self.config.get_text_config().pad_token_id
        if pad_token_id is None:
            raise ValueError(
                "the policy has no pad token: load its tokenizer with stage_grpo.policy.load_tokenizer(policy), "
                "which copies the tokenizer's pad token into the model's config"
            )
        return pad_token_id

    @property
    def base_model(self) -> Any:
        """The seam of ``trl.trainer.utils.add_fused_lm_head``, which calls ``base_model`` and tiles the head."""
        return _ImageBackbone(self)

    def unconditional_ids(self, input_ids: Int[Tensor, "B P"], attention_mask: Int[Tensor, "B P"]) -> Tensor:
        """Blank a prompt: every token but the first and the one that begins the image becomes the pad token.

        Each row keeps its own length and stays attended (as in Janus's own sampling), so a row's result does not
        depend on what else is in the batch.
        """
        position = positions(attention_mask)
        blank = (attention_mask == 1) & (position > 0)
        blank[:, -1] = False
        return input_ids.masked_fill(blank, self.pad_token_id)

    def hidden_states(
        self, input_ids: Int[Tensor, "B P"], codes: Int[Tensor, "B t"], attention_mask: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B n H"]:
        """Run the language model over prompt tokens followed by image codes (teacher forcing).

        Args:
            input_ids: Left-padded prompts.
            codes: The first t tokens of each image.
            attention_mask: 1 for tokens, 0 for padding, over all L = P + t places.

        Returns:
            Last hidden states from the end of the prompt on: those that predict the first n = t + 1 image tokens.
        """
        prompt, position_ids = self.embed_text(input_ids), positions(attention_mask)
        image = self.embed_codes(codes).to(prompt.dtype)  # autocast rounds what its layers give
        if self.shares_prompts:
            first, group = unique_prompts(input_ids, attention_mask[:, : input_ids.shape[1]])
            if len(first) < len(group):
                return hidden_states_of_groups(
                    self.backbone, prompt, image, attention_mask, position_ids, first, group
                )
        outputs = self.backbone(
            inputs_embeds=torch.cat([prompt, image], dim=1),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        )
        return outputs.last_hidden_state[:, prompt.shape[1] - 1 :]

    def head_features(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B T E"]:
        """Inputs of the head's last layer where it predicts an image token, guided if scoring is.

        Args:
            input_ids: P prompt tokens followed by T image codes in each row.
            attention_mask: 1 for tokens, 0 for left padding.
        """
        prompt, codes = input_ids.tensor_split([input_ids.shape[1] - self.num_image_tokens], dim=1)
        codes, attention_mask = codes[:, :-1], attention_mask[:, :-1]  # the last code predicts nothing
        if self.scoring_guidance is None:
            return self.project(self.hidden_states(prompt, codes, attention_mask))
        blank = self.unconditional_ids(prompt, attention_mask[:, : prompt.shape[1]])
        hidden = self.hidden_states(torch.cat([prompt, blank]), codes.repeat(2, 1), attention_mask.repeat(2, 1))
        # The scale amplifies rounding, so guidance is mixed in float32 even in a bfloat16 model.
        conditional, unconditional = self.project(hidden).float().chunk(2)
        return guide(conditional, unconditional, self.scoring_guidance)

    def image_logits(self, features: Float[Tensor, "*n E"]) -> Float[Tensor, "*n V"]:
        """Logits over the codebook in float32, whatever the dtype of the weights."""
        head = self.get_output_embeddings()
        bias = None if head.bias is None else head.bias.float()
        with torch.autocast(features.device.type, enabled=False):
            return nn.functional.linear(features.float(), head.weight.float(), bias)

    def encode_prompts(self, tokenizer: Any, prompts: Sequence[str], template: str = "janus") -> list[list[int]]:
        """Token ids of prompts in the model's own template, from the first token to the one that begins the image.

        Args:
            tokenizer: The checkpoint's tokenizer, with a begin-of-sequence and a ``boi_token``.
            prompts: Plain prompts.
            template: A name in ``PROMPT_TEMPLATES``.

        Raises:
            ValueError: If the template is unknown or a prompt is empty.
        """
        if template not in PROMPT_TEMPLATES:
            raise ValueError(f"prompt_template={template!r} is unknown; use one of {sorted(PROMPT_TEMPLATES)}")
        for i, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ValueError(f"prompt {i} is empty; every prompt needs at least one word")
        texts = [PROMPT_TEMPLATES[template](prompt) + tokenizer.boi_token for prompt in prompts]
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [[tokenizer.bos_token_id, *row] for row in rows]

    def attention_mask_with_image(self, attention_mask: Int[Tensor, "B P"]) -> Int[Tensor, "B L"]:
        """Extend a prompt's mask over its T image tokens."""
        ones = attention_mask.new_ones(attention_mask.shape[0], self.num_image_tokens)
        return torch.cat([attention_mask, ones], dim=1)
