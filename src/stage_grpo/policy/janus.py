"""Janus and Janus-Pro, in transformers' format, as an image policy."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from transformers import JanusForConditionalGeneration

from stage_grpo.policy.base import ImagePolicy
from stage_grpo.policy.decode_cache import Decoder
from stage_grpo.policy.decoder import LlamaDecoder, why_not

logger = logging.getLogger(__name__)


@functools.cache
def _tell_once(reason: str) -> None:
    logger.warning("sampling takes transformers' own decoding step, which is slower: %s", reason)


class JanusPolicy(ImagePolicy, JanusForConditionalGeneration):
    """``JanusForConditionalGeneration`` whose scored output is the image head.

    Load any transformers-format Janus folder or hub name with ``JanusPolicy.from_pretrained``. Weights, config and
    ``generate`` are the parent's; checkpoints written by ``save_pretrained`` load in plain transformers. A new
    policy comes frozen outside the language model.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.freeze()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as in transformers, and freeze: loading replaces the parameters that the constructor froze."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    @property
    def inner_model(self) -> Any:
        """The ``JanusModel`` of transformers."""
        return self.model

    @property
    def backbone(self) -> Any:
        """The Llama language model, without its text head."""
        return self.model.language_model

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens (24 x 24 for Janus-Pro at 384 px)."""
        vqmodel: Any = self.model.vqmodel
        rows, columns = vqmodel.quantize.quant_state_dims
        return rows, columns

    @property
    def image_size(self) -> int:
        """Height of an image in pixels: every level but the last of the VQ model doubles it."""
        return self.grid[0] * 2 ** (len(self.config.vq_config.channel_multiplier) - 1)

    def get_output_embeddings(self) -> nn.Linear:
        """The generation head's last layer."""
        return self.model.generation_head.vision_head

    def get_input_embeddings(self) -> nn.Module:
        """The text embedding."""
        return self.model.language_model.get_input_embeddings()

    def embed_text(self, input_ids: Int[Tensor, "B P"]) -> Float[Tensor, "B P H"]:
        """Text embedding of prompt tokens."""
        return self.get_input_embeddings()(input_ids)

    def embed_codes(self, codes: Int[Tensor, "B t"]) -> Float[Tensor, "B t H"]:
        """Generation embedding and aligner of image codes."""
        return self.prepare_embeddings_for_image_generation(codes)

    def project(self, hidden_states: Float[Tensor, "*n H"]) -> Float[Tensor, "*n E"]:
        """First layer and activation of the generation head."""
        head = self.model.generation_head
        return head.activation_fn(head.proj_out(hidden_states))

    def make_decoder(self, capacity: int) -> Decoder | None:
        """The step of ``decoder.LlamaDecoder`` if this backbone is a plain Llama, with or without LoRA."""
        head: Any = self.model.generation_head
        if (reason := why_not(self.backbone, (head,))) is not None:
            _tell_once(reason)
            return None
        codes = torch.arange(self.get_output_embeddings().out_features, device=self.device)
        return LlamaDecoder(
            self.backbone,
            table=self.embed_codes(codes[None])[0],
            projection=head.proj_out,
            activation=head.activation_fn,
            head=self.get_output_embeddings(),
            capacity=capacity,
        )

    def code_vectors(self, codes: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Codebook rows of the VQ model."""
        return self.model.vqmodel.quantize.embedding(codes).detach().float()

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "B T"]) -> UInt8[Tensor, "B height width 3"]:
        """Decode codes with the VQ model; [-1, 1] becomes [0, 255], truncated as in DeepSeek's example."""
        vqmodel: Any = self.model.vqmodel
        latents = vqmodel.post_quant_conv(vqmodel.quantize.get_codebook_entry(codes))
        if latents.device.type == "cpu":  # oneDNN's convolutions read this layout as it is
            latents = latents.contiguous(memory_format=torch.channels_last)
        pixels = vqmodel.decoder(latents).permute(0, 2, 3, 1).float()
        return ((pixels + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)

    @property
    def decode_bytes_per_image(self) -> int:
        """About eight full-resolution feature maps of the VQ decoder, in float32."""
        return 8 * 4 * self.config.vq_config.base_channels * self.image_size**2

    def freeze(self) -> None:
        """Train the language model's blocks and embedding; freeze vision, VQ and the whole generation stack."""
        self.requires_grad_(False)
        self.model.language_model.requires_grad_(True)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as a plain Janus checkpoint, so that transformers and other tools load it unaided."""
        super().save_pretrained(save_directory, *args, **kwargs)
        self.config.architectures = [JanusForConditionalGeneration.__name__]
        if kwargs.get("is_main_process", True):
            self.config.save_pretrained(save_directory)
