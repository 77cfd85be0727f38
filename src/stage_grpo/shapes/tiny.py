"""The tiny Janus of the shapes world: config, tokenizer and processor, all in transformers' own classes.

Nothing here is patched at run time, so that a saved folder means the same to plain transformers. The image
tokenizer is `JanusVQVAE` at its narrowest (base width 32): 64 pictures decode in 0.2 s on one thread, against
0.6 to 0.9 s at width 64.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from stage_grpo.policy.base import PROMPT_TEMPLATES
from stage_grpo.policy.janus import JanusPolicy
from stage_grpo.shapes.prompts import rows
from stage_grpo.shapes.scenes import IMAGE_SIZE, PATCH_SIZE

WIDTH = 192
NUM_LAYERS = 4
NUM_CODES = 512
CODE_DIM = 8
NUM_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
GUIDANCE_SCALE = 1.5
"""Guidance that the shipped policy is sampled with; stored in its generation config."""
SPECIAL_TOKENS = {
    "bos_token": "<｜begin▁of▁sentence｜>",  # noqa: RUF001
    "eos_token": "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "pad_token": "<｜▁pad▁｜>",  # noqa: RUF001
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
_ROLES = ["<|User|>", "<|Assistant|>"]
_MAX_VOCABULARY = 1024


def _id(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    """Id of a special token, by its key in `SPECIAL_TOKENS`."""
    return tokenizer.get_vocab()[SPECIAL_TOKENS[name]]


def build_text_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges are learned on the captions: each caption word is one token, all text encodes.

    Returns:
        A left-padding tokenizer that prepends the begin-of-sentence token and knows Janus's special tokens.
    """
    specials = [*SPECIAL_TOKENS.values(), *_ROLES]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    captions = [row.prompt for split in ("train", "heldout") for row in rows(split)]
    texts = [template(caption) for template in PROMPT_TEMPLATES.values() for caption in captions]
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    named = {key: SPECIAL_TOKENS[key] for key in ("bos_token", "eos_token", "pad_token")}
    extra = {key: SPECIAL_TOKENS[key] for key in ("image_token", "boi_token", "eoi_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        extra_special_tokens=extra,
        additional_special_tokens=_ROLES,
        clean_up_tokenization_spaces=False,
        **named,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> JanusProcessor:
    """Transformers' processor for 48 x 48 pictures in [-1, 1], on PIL alone."""
    images = JanusImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return JanusProcessor(images, tokenizer, num_image_tokens=NUM_TOKENS)


def build_config(tokenizer: PreTrainedTokenizerFast, num_layers: int = NUM_LAYERS) -> JanusConfig:
    """A Janus of about 2.4 million parameters: 36 image tokens of 8 x 8 pixels, 512 codes of 8 numbers."""
    text: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        # Sequences are about 50 tokens long: the library's 10,000 would leave most frequencies unused.
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    image_codes = JanusVQVAEConfig(
        embed_dim=CODE_DIM,
        num_embeddings=NUM_CODES,
        latent_channels=64,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 2],
        num_res_blocks=0,
        num_patches=IMAGE_SIZE // PATCH_SIZE,
        projection_dim=WIDTH,
        image_token_embed_dim=WIDTH,
    )
    # Generation never looks at pictures, but Janus has an eye and takes the number of image tokens from it.
    vision = JanusVisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        mlp_ratio=1.0,
        projection_dim=WIDTH,
        depth=1,
        num_image_tokens=NUM_TOKENS,
    )
    return JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=image_codes,
        image_token_id=_id(tokenizer, "image_token"),
        tie_word_embeddings=True,
    )


def build_policy(tokenizer: PreTrainedTokenizerFast, num_layers: int = NUM_LAYERS) -> JanusPolicy:
    """An untrained tiny policy; weights come from torch's global generator."""
    policy = JanusPolicy(build_config(tokenizer, num_layers))
    policy.generation_config = GenerationConfig(
        do_sample=True,
        guidance_scale=GUIDANCE_SCALE,
        max_length=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # transformers' image generation looks its begin-of-image token up in here.
        generation_kwargs={"boi_token_id": _id(tokenizer, "boi_token")},
    )
    return policy


def save(policy: JanusPolicy, tokenizer: PreTrainedTokenizerFast, folder: str | os.PathLike[str]) -> Path:
    """Write weights, configs, tokenizer and processor; files of the folder that are not part of them stay.

    Everything is written beside the folder first and moved in file by file, the weights last, so that readers
    never meet a half-written file.

    Raises:
        OSError: the folder cannot be written.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        policy.save_pretrained(scratch)
        build_processor(tokenizer).save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir(), key=lambda path: path.suffix == ".safetensors"):
            file.chmod(0o644)
            os.replace(file, target / file.name)
    return target
