"""Folders of random weights for rewards with a model, of a small or the true architecture, in the layout they load."""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from transformers import (
    AutoModelForImageTextToText,
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    GitConfig,
    GitForCausalLM,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SwinConfig,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

from stage_grpo.prompt_sets.vocabulary import OBJECT_NAMES

SCENES = (
    (("red", "cup"), ("green", "bench")),
    (("black", "cat"), ("brown", "cup")),
    (("white", "cup"), ("blue", "bus")),
    (("yellow", "banana"), ("purple", "cup")),
)
"""Colour and name of the objects that each prompt asks for; one is always a cup, see `random_geneval`."""
VIT_H = ((1280, 32, 16, 14), (1024, 24, 16), "gelu", 1024)
VIT_L = ((1024, 24, 16, 14), (768, 12, 12), "quick_gelu", 768)
SMALL = ((192, 4, 3, 32), (192, 4, 3), "gelu", 64)
"""Width, layers, heads and patch of the image's tower; width, layers and heads of the text's; activation; features."""
CLIPS = {"hps": VIT_H, "pickscore": VIT_H, "clip": VIT_L, "aesthetic": VIT_L}
GIT_LARGE = ((1024, 24, 16, 14, 420), (768, 6, 12))
GIT_SMALL = ((192, 4, 3, 32, 224), (192, 4, 3))
"""Width, layers, heads, patch and side in pixels of the image's tower; width, layers and heads of the text's."""
ORM_LAYERS = 2
"""Of the image's tower and of the language model each: all 26 and 28 of them would take 16 GB in bfloat16."""
QWEN_LAYERS = (32, 28)
"""Of the image's tower and of the language model of Qwen2.5-VL 7B."""
QWEN_FEW_LAYERS = (2, 2)
QWEN_PARAMETERS = 8_292_166_656
"""Of the published checkpoint, whose index gives its size as twice as many bytes."""
QWEN_SPECIAL = {
    151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>", 151652: "<|vision_start|>",
    151653: "<|vision_end|>", 151654: "<|vision_pad|>", 151655: "<|image_pad|>", 151656: "<|video_pad|>",
}  # fmt: skip
ANSWER_TOKENS = 16
"""A random judge never ends its answer; as many as a terse answer has."""
BERT_SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}


class RandomReward(NamedTuple):
    """Options that make a reward use random weights, and in what they fall short of the true architecture."""

    options: dict[str, Any]
    note: str = ""


def random_clip(folder: Path, sizes: tuple) -> None:
    (width, layers, heads, patch), (text_width, text_layers, text_heads), act, features = sizes
    pieces = [piece + end for end in ("", "</w>") for piece in sorted(ByteLevel.alphabet())]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]).save_pretrained(folder)
    vision = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "patch_size": patch}
    text = {"hidden_size": text_width, "num_hidden_layers": text_layers, "num_attention_heads": text_heads}
    config = CLIPConfig(
        vision_config=vision | {"intermediate_size": 4 * width, "hidden_act": act},
        text_config=text | {"intermediate_size": 4 * text_width, "hidden_act": act, "eos_token_id": len(pieces) - 1},
        projection_dim=features,
    )
    CLIPModel(config).save_pretrained(folder)


def random_head(file: Path, num_inputs: int) -> None:
    widths = [num_inputs, 1024, 128, 64, 16, 1]
    layers = {f"layers.{i}.weight": torch.randn(b, a) / a**0.5 for i, (a, b) in enumerate(pairwise(widths))}
    save_file(layers | {f"layers.{i}.bias": torch.zeros(b) for i, b in enumerate(widths[1:])}, file)


def random_image_reward(folder: Path, is_small: bool) -> RandomReward:
    (width, layers, patch), (text_width, text_layers) = (
        ((192, 4, 32), (192, 4)) if is_small else ((1024, 24, 16), (768, 12))
    )
    vision = BlipVisionConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, image_size=224)
    vision.num_attention_heads, vision.layer_norm_eps, vision.patch_size = width // 64, 1e-6, patch
    BlipVisionModel(vision).save_pretrained(folder / "vision")
    text = BlipTextConfig(hidden_size=text_width, intermediate_size=4 * text_width, num_hidden_layers=text_layers)
    text.num_attention_heads, text.encoder_hidden_size = text_width // 64, width
    BlipTextModel(text, add_pooling_layer=False).save_pretrained(folder / "text")
    random_head(folder / "head.safetensors", text_width)
    BertTokenizer().save_pretrained(folder)
    return RandomReward({"weights": str(folder)})


def random_bert_tokenizer(folder: Path) -> None:
    """A tokenizer that makes one token of each word of the scenes, with BERT's special tokens in BERT's places."""
    words = ["yes", "no", *sorted({word for scene in SCENES for thing in scene for word in thing})]
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    entries = [f"[unused{index}]" for index in range(1100)]
    entries[104 : 104 + len(words) + len(letters)] = [*words, *letters]
    for index, word in BERT_SPECIAL.items():
        entries[index] = word
    BertTokenizer(vocab={word: index for index, word in enumerate(entries)}).save_pretrained(folder)


def random_git(folder: Path, is_small: bool) -> RandomReward:
    (width, layers, heads, patch, side), (text_width, text_layers, text_heads) = GIT_SMALL if is_small else GIT_LARGE
    vision = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "patch_size": patch}
    config = GitConfig(
        vision_config=vision | {"intermediate_size": 4 * width, "image_size": side},
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=text_layers,
        num_attention_heads=text_heads,
    )
    GitForCausalLM(config).save_pretrained(folder)
    random_bert_tokenizer(folder)
    crop = {"height": side, "width": side}
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop).save_pretrained(folder)
    return RandomReward({"weights": str(folder)})


def random_gdino(folder: Path) -> RandomReward:
    """Swin-T and BERT-base, which are the library's own defaults but for the image encoder's window and outputs."""
    swin = SwinConfig(
        embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, image_size=224,
        out_indices=[2, 3, 4],
    )  # fmt: skip
    GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=swin)).save_pretrained(folder)
    GroundingDinoImageProcessorPil().save_pretrained(folder)
    random_bert_tokenizer(folder)
    return RandomReward({"weights": str(folder)})


def random_geneval(folder: Path) -> RandomReward:
    """Swin-S detector and CLIP ViT-L. The detector sees cups, so that there are masks to make and a colour to name."""
    swin = SwinConfig(
        embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7, image_size=224,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    names = dict(enumerate(OBJECT_NAMES))
    config = Mask2FormerConfig(backbone_config=swin, id2label=names, label2id={name: i for i, name in names.items()})
    detector = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        detector.class_predictor.bias[OBJECT_NAMES.index("cup")] += 10
    detector.save_pretrained(folder / "detector")
    (folder / "clip").mkdir()
    random_clip(folder / "clip", VIT_L)
    return RandomReward({"weights": str(folder / "detector"), "color_weights": str(folder / "clip")})


def random_orm(folder: Path) -> RandomReward:
    """LLaVA-OneVision of the width of SigLIP so400m and Qwen2 7B, of few layers."""
    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=ORM_LAYERS, num_attention_heads=16, image_size=384,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip
    text = Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=ORM_LAYERS, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
    LlavaOnevisionForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    size = {"height": 384, "width": 384}
    SiglipImageProcessorPil(size=size, image_mean=half, image_std=half).save_pretrained(folder)
    # One token a word, nearly as many as Qwen's own tokenizer makes of a prompt.
    words = Tokenizer(WordLevel({"<unk>": 0, "yes": 1, "no": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = ["<|im_start|>", "<|im_end|>"]
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<unk>", extra_special_tokens=special
    ).save_pretrained(folder)
    note = f"reduced depth: {ORM_LAYERS} + {ORM_LAYERS} layers of 26 + 28"
    return RandomReward({"weights": str(folder)}, note)


def qwen_config(num_layers: tuple[int, int]) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL 7B with a number of layers of its own of the image's tower and of the language model."""
    # The last layer of every eight sees the whole picture, the others see windows of it.
    vision = {
        "depth": num_layers[0], "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 3584, "tokens_per_second": 2,
        "fullatt_block_indexes": [i for i in range(num_layers[0]) if i % 8 == 7] or [num_layers[0] - 1],
    }  # fmt: skip
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": num_layers[1], "rms_norm_eps": 1e-6,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)


def random_judge(folder: Path, answer: str) -> RandomReward:
    """Qwen2.5-VL 7B of few layers. Every ordinary token of its language is an answer with a score of 1 to 5.

    Args:
        folder: Where it goes.
        answer: What a token says; ``{score}`` stands for its score.
    """
    with torch.device("meta"):
        whole = Qwen2_5_VLForConditionalGeneration(qwen_config(QWEN_LAYERS))
    assert sum(weight.numel() for weight in whole.parameters()) == QWEN_PARAMETERS
    config = qwen_config(QWEN_FEW_LAYERS)
    AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    num_words = min(QWEN_SPECIAL)
    words = [answer.replace("{score}", f"{1 + 4 * index / num_words:.5f}") for index in range(num_words)]
    vocabulary = {**{word: index for index, word in enumerate(words)}, **{t: i for i, t in QWEN_SPECIAL.items()}}
    # A word of a question is the first word of the language, which is one token a word.
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = Whitespace()
    special = list(QWEN_SPECIAL.values())
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[2], extra_special_tokens=special
    ).save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    note = "reduced depth: {} + {} layers of {} + {}".format(*QWEN_FEW_LAYERS, *QWEN_LAYERS)
    note += f"; answers of {ANSWER_TOKENS} tokens"
    return RandomReward({"weights": str(folder), "max_tokens": ANSWER_TOKENS}, note)


TRUE_ONLY: dict[str, Callable[[Path], RandomReward]] = {
    "geneval": random_geneval,
    "gdino": random_gdino,
    "orm": random_orm,
    "vlm_judge": partial(random_judge, answer='{"score": {score}}'),
    "unified_reward": partial(random_judge, answer="Final Score: {score}"),
}
EITHER: dict[str, Callable[[Path, bool], RandomReward]] = {"git": random_git, "image_reward": random_image_reward}


def random_reward(name: str, folder: Path, is_small: bool) -> RandomReward:
    """Writes random weights of a reward into a folder."""
    torch.manual_seed(0)
    if name in EITHER:
        return EITHER[name](folder, is_small)
    if name in TRUE_ONLY and not is_small:
        return TRUE_ONLY[name](folder)
    if name not in CLIPS:
        remedy = "use --random true" if name in TRUE_ONLY else "get its own, and leave --random out"
        raise SystemExit(f"{name} has no such random weights here; {remedy}")
    sizes = SMALL if is_small else CLIPS[name]
    random_clip(folder, sizes)
    if name != "aesthetic":
        return RandomReward({"weights": str(folder)})
    (folder / "head").mkdir()
    random_head(folder / "head" / "model.safetensors", sizes[-1])
    return RandomReward({"weights": str(folder / "head"), "clip_weights": str(folder)})
