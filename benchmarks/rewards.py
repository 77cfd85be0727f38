"""Seconds an image of rewards: a whole batch at once against one image at a time, as many public codes score them.

    python benchmarks/rewards.py --random small                       # random weights, small models: any machine
    python benchmarks/rewards.py --random true --rewards hps clip     # random weights, the true architectures
    python benchmarks/rewards.py --random true --rewards geneval git gdino orm --num-images 1
    python benchmarks/rewards.py --rewards hps --dtype bfloat16       # weights from `stage weights get`

Prints a table; --out also writes it as JSON. Images come in groups that share a prompt, as in training. A single image
is only timed alone. Loading is not timed; peak memory is the process's, or the GPU's where there is one, with loading.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from random_rewards import SCENES, RandomReward, random_reward
from safetensors import safe_open

from stage_grpo import weights as weights_cache
from stage_grpo.rewards.registry import build_reward

PROMPTS = [" and ".join(f"a {color} {name}" for color, name in scene) for scene in SCENES]
METADATA = [
    {
        "task_type": "color",
        "nouns": [name for _, name in scene],
        "attr_nouns": [f"{color} {name}" for color, name in scene],
        "tag": "color_attr",
        "include": [{"class": name, "count": 1, "color": color} for color, name in scene],
    }
    for scene in SCENES
]
"""Of each prompt, as a row of T2I-R1 and as one of GenEval."""


def num_parameters(folders: list[Path]) -> int:
    """Of all weights that lie in folders, without whole numbers such as indices."""
    total = 0
    for file in (file for folder in folders for file in folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            slices = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118 - no mapping
        total += sum(math.prod(piece.get_shape()) for piece in slices if "F" in piece.get_dtype())
    return total


def forget_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif (marks := Path("/proc/self/clear_refs")).exists():
        marks.write_text("5")


def peak_gigabytes() -> float:
    """The most memory taken since `forget_peak`; NaN where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e9 if found else math.nan


def seconds_per_image(reward, samples: tuple[list, ...], at_a_time: int) -> float:
    num_images = len(samples[0])
    start = time.perf_counter()
    for i in range(0, num_images, at_a_time):
        scores = reward.score(*(part[i : i + at_a_time] for part in samples)).scores
        assert np.isfinite(scores).all()
    return (time.perf_counter() - start) / num_images


def measure(name: str, args: argparse.Namespace) -> dict:
    generator = np.random.default_rng(0)
    shape = (args.side, args.side, 3)
    images = [Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for _ in range(args.num_images)]
    places = [i // args.group % len(PROMPTS) for i in range(args.num_images)]
    samples = images, [PROMPTS[place] for place in places], [METADATA[place] for place in places]
    with tempfile.TemporaryDirectory() as folder:
        is_small = args.random == "small"
        made = random_reward(name, Path(folder), is_small) if args.random else RandomReward({})
        forget_peak()
        reward = build_reward(name, {**made.options, "dtype": args.dtype, "batch_size": args.num_images})
        seconds_per_image(reward, tuple(part[:2] for part in samples), 2)  # loads the model
        row = {"reward": name, "seconds_one_by_one": seconds_per_image(reward, samples, 1), "note": made.note}
        if args.num_images > 1:
            row["seconds_batched"] = seconds_per_image(reward, samples, args.num_images)
            row["ratio"] = row["seconds_one_by_one"] / row["seconds_batched"]
        row["peak_gigabytes"] = peak_gigabytes()
        folders = [Path(folder)] if args.random else [weights_cache.folder(need) for need in reward.needed_weights()]
        return row | {"num_parameters": num_parameters(folders)}


def as_line(row: dict) -> str:
    cells = f"{row['reward']:14}{row['num_parameters'] / 1e6:10.1f}{row['seconds_one_by_one']:12.3f}"
    if "ratio" in row:
        cells += f"{row['seconds_batched']:12.3f}{row['ratio']:8.2f}"
    return f"{cells}{row['peak_gigabytes']:9.1f}  {row['note']}".rstrip()


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
    print(f"{args.num_images} images, {device}, {args.dtype}, weights: {args.random or 'official'}; seconds an image")
    compared = f"{'batched':>12}{'ratio':>8}" if args.num_images > 1 else ""
    print(f"{'reward':14}{'million':>10}{'one by one':>12}{compared}{'peak GB':>9}")
    rows = []
    for name in args.rewards:
        rows.append(measure(name, args))
        print(as_line(rows[-1]), flush=True)
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        about = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**settings, **about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
