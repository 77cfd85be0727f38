"""Seconds an image of rewards: a whole batch at once against one image at a time, as many public codes score them.

    python benchmarks/rewards.py --random small                       # random weights, small models: any machine
    python benchmarks/rewards.py --random true --rewards hps clip     # random weights, the true architectures
    python benchmarks/rewards.py --random true --rewards geneval git gdino orm --num-images 1 --dtype float32
    python benchmarks/rewards.py --random true --rewards vlm_judge unified_reward --num-images 1
    python benchmarks/rewards.py --rewards hps --dtype bfloat16       # weights from `stage weights get`

Prints a table; --out also writes it as JSON. Images come in groups that share a prompt, as in training. A single image
is only timed alone. Loading is not timed; peak memory is the process's, or the GPU's where there is one, with loading.

Times are the fastest of --repeats, one by one and batched in turn. "outside" are seconds an image outside the
networks, at the whole batch: reading pixels, resizing, words. "products" are those of the networks' bare matrix
products at the whole batch, run once more with nothing between them. No batching can remove either, so that the ratio
cannot exceed "bound": one by one / (outside + products). On one CPU thread (OMP_NUM_THREADS=1) all are CPU time, which
other work on the machine does not stretch.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch
from memory import forget_peak, peak_bytes
from PIL import Image
from random_rewards import SCENES, RandomReward, random_reward
from reward_bound import Products, clock, time_in_networks, wait
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


def seconds_per_image(reward, samples: tuple[list, ...], at_a_time: int) -> float:
    num_images = len(samples[0])
    wait()
    start = clock()
    for i in range(0, num_images, at_a_time):
        scores = reward.score(*(part[i : i + at_a_time] for part in samples)).scores
        assert np.isfinite(scores).all()
    return (clock() - start) / num_images


def compare(reward, samples: tuple[list, ...], repeats: int) -> dict[str, float]:
    """Batched against one by one, and how far batching can go."""
    num_images = len(samples[0])
    alone, batched, outside = [], [], []
    for _ in range(repeats):
        alone.append(seconds_per_image(reward, samples, 1))
        with time_in_networks() as inside:
            batched.append(seconds_per_image(reward, samples, num_images))
        outside.append(batched[-1] - sum(inside) / num_images)
    with Products() as products:
        seconds_per_image(reward, samples, num_images)
    row = {"seconds_one_by_one": min(alone), "seconds_batched": min(batched), "ratio": min(alone) / min(batched)}
    least = {"seconds_outside": min(outside), "seconds_products": products.seconds() / num_images}
    return row | least | {"bound": row["seconds_one_by_one"] / sum(least.values())}


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
        dtype = {"dtype": args.dtype} if args.dtype else {}
        reward = build_reward(name, {**made.options, **dtype, "batch_size": args.num_images})
        seconds_per_image(reward, tuple(part[:2] for part in samples), 2)  # loads the model
        row = {"reward": name, "dtype": reward.options.dtype, "note": made.note}
        if args.num_images > 1:
            row |= compare(reward, samples, args.repeats)
        else:
            row["seconds_one_by_one"] = min(seconds_per_image(reward, samples, 1) for _ in range(args.repeats))
        row["peak_gigabytes"] = peak_bytes() / 1e9
        folders = [Path(folder)] if args.random else [weights_cache.folder(need) for need in reward.needed_weights()]
        return row | {"num_parameters": num_parameters(folders)}


COLUMNS = ("seconds_one_by_one", "seconds_batched", "ratio", "seconds_outside", "seconds_products", "bound")


def as_line(row: dict) -> str:
    cells = f"{row['reward']:15}{row['dtype']:9}{row['num_parameters'] / 1e6:9.1f}"
    cells += "".join(f"{row[key]:12.4f}" for key in COLUMNS if key in row)
    return f"{cells}{row['peak_gigabytes']:9.1f}  {row['note']}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", default=["hps", "clip", "pickscore", "aesthetic", "image_reward"])
    parser.add_argument("--random", choices=["small", "true"])
    parser.add_argument("--num-images", type=int, default=32)
    parser.add_argument("--group", type=int, default=8, help="images that share a prompt")
    parser.add_argument("--side", type=int, default=384, help="of an image, in pixels")
    parser.add_argument("--dtype", help="by default the reward's own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.num_images} images, {device}, weights: {args.random or 'official'}; seconds an image")
    titles = [key.removeprefix("seconds_").replace("_", " ") for key in COLUMNS[: None if args.num_images > 1 else 1]]
    print(f"{'reward':15}{'dtype':9}{'million':>9}{''.join(f'{title:>12}' for title in titles)}{'peak GB':>9}")
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
