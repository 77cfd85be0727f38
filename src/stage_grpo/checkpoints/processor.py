"""Tokenizer and image processor of a checkpoint, written in the files of the other format.

Source: ``janus/models/{processing_vlm,image_processing_vlm}.py`` and ``janus/utils/conversation.py`` in
github.com/deepseek-ai/Janus.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import AddedToken, JanusProcessor, PreTrainedTokenizerFast
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from stage_grpo.checkpoints.errors import need, read_json, write_json

IMAGE, BEGIN, END = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
PAD = "<｜▁pad▁｜>"  # noqa: RUF001 - the wide bar is part of the token
ROLES = ["<|User|>", "<|Assistant|>"]
IMAGE_KEYS = ("min_size", "image_mean", "image_std", "rescale_factor", "do_normalize")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set role = message['role'] | lower -%}"
    "{%- set parts = namespace(text='') -%}"
    "{%- if message['content'] is string -%}{%- set parts.text = message['content'] | trim -%}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- set piece = '<image_placeholder>' if part['type'] == 'image' else part['text'] | trim -%}"
    "{%- set parts.text = parts.text + ('' if loop.first else '\n') + piece -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if role == 'system' -%}{{- parts.text + '\n\n' -}}"
    "{%- else -%}"
    "{{- '<|Assistant|>:' if role == 'assistant' else '<|User|>:' -}}"
    "{%- if parts.text -%}{{- ' ' + parts.text + (eos_token if role == 'assistant' else '\n\n') -}}{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|Assistant|>:' -}}{%- endif -%}"
)
"""DeepSeek's conversation format: role, colon, text; a question ends in a blank line, an answer in the end token."""
MAX_LENGTH = 16384
"""Context of Janus, for tokenizer files that do not say."""


def read_original_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer of an original-format checkpoint.

    The released files call it ``LlamaTokenizerFast``, which adds the begin-of-sentence token whatever
    ``tokenizer.json`` says; that rule is written into the tokenizer itself, so that any loader obeys it.

    Raises:
        ValueError: If a file is missing, or the tokenizer lacks a token of the image prompt.
    """
    settings = read_json(folder / "tokenizer_config.json")
    special_map = folder / "special_tokens_map.json"
    special = read_json(special_map) if special_map.is_file() else {}
    tokenizer = _load(folder / "tokenizer.json")
    named = {f"{name}_token": _token(settings, special, f"{name}_token") for name in ("bos", "eos")}
    named["pad_token"] = _optional_token(settings, special, "pad_token") or PAD
    # DeepSeek's processor adds the placeholder of an image to a tokenizer without one.
    if tokenizer.token_to_id(IMAGE) is None:
        tokenizer.add_special_tokens([IMAGE])
    for token in (*named.values(), BEGIN, END):
        known = tokenizer.token_to_id(token) is not None
        need(known, f"{folder / 'tokenizer.json'} does not know the token {token!r}; it is no tokenizer of Janus")
    if settings.get("add_bos_token", True):
        _prepend(tokenizer, named["bos_token"])
    others = [_text(token) for token in special.get("additional_special_tokens", [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        model_max_length=settings.get("model_max_length", MAX_LENGTH),
        extra_special_tokens={"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": END},
        additional_special_tokens=[token for token in others if token not in (IMAGE, BEGIN, END)],
        clean_up_tokenization_spaces=False,
        **named,
    )


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids that the model's config repeats: ``bos``, ``eos``, ``pad``, ``image``, ``boi``."""
    names = {name: getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "image", "boi")}
    vocabulary = tokenizer.get_vocab()
    return {name: vocabulary[token] for name, token in names.items()}


def write_transformers_processor(
    tokenizer: PreTrainedTokenizerFast, src: Path, dst: Path, num_image_tokens: int
) -> None:
    """Write tokenizer, image processor and chat template in transformers' files.

    Args:
        tokenizer: From `read_original_tokenizer`.
        src: Folder of the original checkpoint.
        dst: Folder to write into.
        num_image_tokens: Image tokens of the model.

    Raises:
        ValueError: If the checkpoint's processor disagrees with its model about the number of image tokens.
    """
    images = read_json(src / "preprocessor_config.json")
    count = read_json(src / "processor_config.json").get("num_image_tokens", num_image_tokens)
    need(
        count == num_image_tokens,
        f"{src / 'processor_config.json'}: num_image_tokens={count}, but config.json makes it {num_image_tokens}",
    )
    side = images["image_size"]
    options = {key: images[key] for key in IMAGE_KEYS if key in images}
    processor = JanusProcessor(
        JanusImageProcessorPil(size={"height": side, "width": side}, **options),
        tokenizer,
        chat_template=CHAT_TEMPLATE,
        # As DeepSeek's processor does for questions about images; prompts of image generation never get it.
        use_default_system_prompt=True,
        num_image_tokens=num_image_tokens,
    )
    processor.save_pretrained(dst)


def write_original_processor(src: Path, dst: Path, image_size: int, num_image_tokens: int) -> None:
    """Write the tokenizer and processor files that DeepSeek's code reads.

    Args:
        src: Folder of the transformers-format checkpoint.
        dst: Folder to write into.
        image_size: Height and width of pictures, in pixels.
        num_image_tokens: Image tokens of the model.

    Raises:
        ValueError: If a tokenizer file is missing.
    """
    settings = read_json(src / "tokenizer_config.json")
    need((src / "tokenizer.json").is_file(), f"{src / 'tokenizer.json'} is missing; save the tokenizer with the model")
    shutil.copyfile(src / "tokenizer.json", dst / "tokenizer.json")
    special = {f"{name}_token": _token(settings, {}, f"{name}_token") for name in ("bos", "eos", "pad")}
    fixed = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": True}
    length = {"model_max_length": min(settings.get("model_max_length", MAX_LENGTH), MAX_LENGTH)}
    write_json(dst / "tokenizer_config.json", {**fixed, **special, **length, "tokenizer_class": "LlamaTokenizerFast"})
    write_json(dst / "special_tokens_map.json", {"additional_special_tokens": [IMAGE, BEGIN, END, *ROLES], **special})
    kept = _image_settings(src)
    mean = kept.setdefault("image_mean", [0.5] * 3)
    kept |= {"image_size": image_size, "background_color": [int(255 * value) for value in mean]}
    kept |= {"image_processor_type": "VLMImageProcessor", "processor_class": "VLChatProcessor"}
    write_json(dst / "preprocessor_config.json", {"image_std": [0.5] * 3, "min_size": 14, **kept})
    chat = {"image_tag": IMAGE, "num_image_tokens": num_image_tokens, "sft_format": "deepseek"}
    chat |= {"add_special_token": False, "ignore_id": -100, "mask_prompt": True, "processor_class": "VLChatProcessor"}
    write_json(dst / "processor_config.json", chat)


def _image_settings(src: Path) -> dict[str, Any]:
    """Settings of the image processor; those saved by older releases of transformers have a file of their own."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (src / name).is_file():
            content = read_json(src / name)
            settings = content.get("image_processor", content)
            if "image_mean" in settings:
                return {key: settings[key] for key in IMAGE_KEYS if key in settings}
    return {}


def _load(path: Path) -> Tokenizer:
    need(path.is_file(), f"{path} is missing; download the whole checkpoint")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(f"{path} is not a whole tokenizer ({error}); download it again") from error


def _prepend(tokenizer: Tokenizer, bos: str) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def _token(settings: dict[str, Any], special: dict[str, Any], name: str) -> str:
    token = _optional_token(settings, special, name)
    if token is None:
        raise ValueError(f"the tokenizer files name no {name}; a Janus checkpoint needs one")
    return token


def _optional_token(settings: dict[str, Any], special: dict[str, Any], name: str) -> str | None:
    token = special.get(name) or settings.get(name)
    return None if token is None else _text(token)


def _text(token: str | dict[str, Any] | AddedToken) -> str:
    """A token as text; files write it either bare or with its stripping rules."""
    return token["content"] if isinstance(token, dict) else str(token)
