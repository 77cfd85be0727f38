"""Images a second of rewards: a whole batch at once against one image at a time, as many public codes score them.

    python benchmarks/rewards.py --random small                       # random weights, small models: any machine
    python benchmarks/rewards.py --random true --rewards hps clip     # random weights, the true architectures
    python benchmarks/rewards.py --rewards hps --dtype bfloat16       # weights from `stage weights get`

Prints a table; --out also writes it as JSON. Images come in groups that share a prompt, as in training.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

from stage_grpo.rewards.registry import build_reward

PROMPTS = ("a red cube", "two cats", "a photo of a dog", "a green bench")
VIT_H = ((1280, 32, 16, 14), (1024, 24, 16), "gelu", 1024)
VIT_L = ((1024, 24, 16, 14), (768, 12, 12), "quick_gelu", 768)
SMALL = ((192, 4, 3, 32), (192, 4, 3), "gelu", 64)
"""Width, layers, heads and patch of the image's tower; width, layers and heads of the text's; activation; features."""
CLIPS = {"hps": VIT_H, "pickscore": VIT_H, "clip": VIT_L, "aesthetic": VIT_L}


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


def random_image_reward(folder: Path, is_small: bool) -> None:
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


def random_options(name: str, folder: Path, is_small: bool) -> dict[str, str]:
    """Options that make a reward use random weights, which are written into a folder."""
    torch.manual_seed(0)
    if name == "image_reward":
        random_image_reward(folder, is_small)
        return {"weights": str(folder)}
    if name not in CLIPS:
        raise SystemExit(f"{name} has no random weights here; get its own, and leave --random out")
    sizes = SMALL if is_small else CLIPS[name]
    random_clip(folder, sizes)
    if name != "aesthetic":
        return {"weights": str(folder)}
    (folder / "head").mkdir()
    random_head(folder / "head" / "model.safetensors", sizes[-1])
    return {"weights": str(folder / "head"), "clip_weights": str(folder)}


def images_per_second(reward, images: list, prompts: list[str], at_a_time: int) -> float:
    start = time.perf_counter()
    for i in range(0, len(images), at_a_time):
        scores = reward.score(images[i : i + at_a_time], prompts[i : i + at_a_time]).scores
        assert np.isfinite(scores).all()
    return len(images) / (time.perf_counter() - start)


def measure(name: str, args: argparse.Namespace) -> dict:
    generator = np.random.default_rng(0)
    shape = (args.side, args.side, 3)
    images = [Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for _ in range(args.num_images)]
    prompts = [PROMPTS[i // args.group % len(PROMPTS)] for i in range(args.num_images)]
    with tempfile.TemporaryDirectory() as folder:
        options = random_options(name, Path(folder), args.random == "small") if args.random else {}
        reward = build_reward(name, {**options, "dtype": args.dtype, "batch_size": args.num_images})
        images_per_second(reward, images[:2], prompts[:2], 2)  # loads the model
        singly = images_per_second(reward, images, prompts, 1)
        batched = images_per_second(reward, images, prompts, args.num_images)
    return {"reward": name, "one_by_one": singly, "batched": batched, "ratio": batched / singly}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", default=["hps", "clip", "pickscore", "aesthetic", "image_reward"])
    parser.add_argument("--random", choices=["small", "true"])
    parser.add_argument("--num-images", type=int, default=32)
    parser.add_argument("--group", type=int, default=8, help="images that share a prompt")
    parser.add_argument("--side", type=int, default=384, help="of an image, in pixels")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.num_images} images, {device}, {args.dtype}, weights: {args.random or 'official'}")
    print(f"{'reward':14}{'one by one':>12}{'batched':>12}{'ratio':>8}   images/s")
    rows = []
    for name in args.rewards:
        rows.append(measure(name, args))
        print(
            f"{name:14}{rows[-1]['one_by_one']:12.2f}{rows[-1]['batched']:12.2f}{rows[-1]['ratio']:8.2f}", flush=True
        )
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        about = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**settings, **about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
