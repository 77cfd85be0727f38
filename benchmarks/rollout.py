"""The rollout against the loop of the field's public codes and against transformers' own generate, in paired runs.

    python benchmarks/rollout.py --size tiny --out outputs/rollout_tiny.json
    python benchmarks/rollout.py --size mid --prompts 1 --groups 8 --out outputs/rollout_mid.json
    python benchmarks/rollout.py --size 7b --groups 1 4 8 16 32 --prompts 1 8 --out outputs/rollout_7b.json  # a GPU

`tiny` is the shipped model; `mid` has about 36 million random weights, 16,384 codes and --side x --side tokens; `1b`
and `7b` are the published Janus-Pro configurations with random weights in bfloat16, on a GPU alone. In each repeat the
alternatives run one after the other in this process. A ratio is the median over repeats of theirs divided by ours, in
time; processor time of the process stands beside wall time, as other work on the machine moves it less. Memory is the
growth of the process's peak, or of the GPU's, in the first run of each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from field_loop import published_loop, transformers_generate
from memory import forget_peak, held_bytes, peak_bytes
from transformers import GenerationConfig, JanusConfig, JanusVisionConfig, JanusVQVAEConfig

from stage_grpo.checkpoints.configs import to_transformers_config
from stage_grpo.planning.sizes import PUBLISHED
from stage_grpo.policy import load_policy, load_tokenizer
from stage_grpo.policy.janus import JanusPolicy
from stage_grpo.rollout import rollout
from stage_grpo.sampling import Sampling, image_uniforms

ROOT = Path(__file__).parents[1]
TINY = ROOT / "assets" / "tiny-janus-shapes"
TOKEN_IDS = {"bos": 0, "eos": 1, "pad": 2, "image": 3}
BEGIN_OF_IMAGE = 4
PROMPT_LENGTH = 20
GROUPS = {"tiny": [8], "mid": [8], "1b": [1, 4, 8, 16, 32], "7b": [1, 4, 8, 16, 32]}
PROMPTS = {"tiny": [8], "mid": [1], "1b": [1, 8], "7b": [1, 8]}
ALTERNATIVES = ("field_loop", "generate")


def mid_config(side: int) -> JanusConfig:
    text = {
        "model_type": "llama", "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1408,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1024,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    codes = JanusVQVAEConfig(
        embed_dim=8, num_embeddings=16384, latent_channels=64, base_channels=32, channel_multiplier=[1, 1, 1, 2],
        num_res_blocks=0, num_patches=side, projection_dim=512, image_token_embed_dim=512,
    )  # fmt: skip
    vision = JanusVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=8 * side, patch_size=8, mlp_ratio=1.0,
        projection_dim=512, depth=1, num_image_tokens=side * side,
    )  # fmt: skip
    return JanusConfig(text_config=text, vision_config=vision, vq_config=codes, image_token_id=3)


def build_policy(size: str, side: int) -> JanusPolicy:
    if size == "tiny":
        return load_policy(str(TINY)).eval()
    torch.manual_seed(0)
    if size == "mid":
        policy = JanusPolicy(mid_config(side))
    else:
        if not torch.cuda.is_available():
            raise ValueError(f"size={size!r} needs a GPU and this machine has none; use --size tiny or mid")
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            policy = JanusPolicy(to_transformers_config(PUBLISHED[f"Janus-Pro-{size.upper()}"], TOKEN_IDS))
        torch.set_default_dtype(torch.float32)
    # transformers' generate allocates as many tokens as max_length says.
    policy.generation_config = GenerationConfig(
        do_sample=True, guidance_scale=5.0, max_length=PROMPT_LENGTH + policy.num_image_tokens,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, generation_kwargs={"boi_token_id": BEGIN_OF_IMAGE},
    )  # fmt: skip
    return policy.eval()


def prompts_of(policy: JanusPolicy, size: str, num_prompts: int, group: int) -> list[list[int]]:
    """Token ids of each image's prompt; the prompts of one run differ in length."""
    if size == "tiny":
        rows = (ROOT / "assets" / "shapes" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(rows[i * len(rows) // num_prompts])["prompt"] for i in range(num_prompts)]
        unique = policy.encode_prompts(load_tokenizer(policy), texts)
    else:
        draws = torch.Generator().manual_seed(0)
        lengths = [PROMPT_LENGTH - 2 - i % 4 for i in range(num_prompts)]
        unique = [[0, *torch.randint(5, 1000, (n,), generator=draws).tolist(), BEGIN_OF_IMAGE] for n in lengths]
    return [ids for ids in unique for _ in range(group)]


def timed(work: Callable[[], Any]) -> dict[str, float]:
    forget_peak()
    before = held_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": wall, "cpu_seconds": cpu, "peak_gigabytes": (peak_bytes() - before) / 1e9}


def compare(policy: JanusPolicy, prompt_ids: list[list[int]], guidance: float, repeats: int) -> dict[str, Any]:
    """Medians of each way, and of the ratios of the runs of one repeat."""
    uniforms = image_uniforms([(0, i) for i in range(len(prompt_ids))], policy.num_image_tokens)
    ways = {
        "rollout": lambda: rollout(policy, prompt_ids, uniforms, Sampling(guidance), record="conditional"),
        "field_loop": lambda: published_loop(policy, prompt_ids, guidance),
        "generate": lambda: transformers_generate(policy, prompt_ids, guidance),
    }
    first = {name: timed(work) for name, work in ways.items()}  # warms up, and is the one run that shows the memory
    runs = [{name: timed(work) for name, work in ways.items()} for _ in range(repeats)]
    row: dict[str, Any] = {"images": len(prompt_ids), "tokens": len(prompt_ids) * policy.num_image_tokens}
    for name in ways:
        for field in ("seconds", "cpu_seconds"):
            row[f"{field}_{name}"] = statistics.median(run[name][field] for run in runs)
        row[f"tokens_per_second_{name}"] = row["tokens"] / row[f"seconds_{name}"]
        row[f"peak_gigabytes_{name}"] = first[name]["peak_gigabytes"]
    for name in ALTERNATIVES:
        for field, key in (("seconds", "ratio"), ("cpu_seconds", "cpu_ratio")):
            row[f"{key}_{name}"] = statistics.median(run[name][field] / run["rollout"][field] for run in runs)
    return row | {"runs": runs}


def as_line(row: dict[str, Any]) -> str:
    seconds = "".join(f"{row[f'seconds_{name}']:12.3f}" for name in ("rollout", *ALTERNATIVES))
    ratios = "".join(f"{row[f'{key}_{name}']:9.2f}" for key in ("ratio", "cpu_ratio") for name in ALTERNATIVES)
    peaks = "".join(f"{row[f'peak_gigabytes_{name}']:8.2f}" for name in ("rollout", *ALTERNATIVES))
    return f"{row['prompts']:7}{row['group']:7}{seconds}{ratios}{peaks}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("rollout", *ALTERNATIVES):
        for num_prompts in sorted({row["prompts"] for row in rows}):
            some = [row for row in rows if row["prompts"] == num_prompts]
            speeds = [row[f"tokens_per_second_{name}"] for row in some]
            label = f"{name}, {num_prompts} prompts"
            axes.plot([row["group"] for row in some], speeds, marker="o", label=label)
    axes.set(xlabel="images a prompt", ylabel="tokens a second", ylim=(0, None))
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(GROUPS), default="tiny")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--groups", type=int, nargs="+", help="images a prompt")
    parser.add_argument("--prompts", type=int, nargs="+", help="prompts a rollout")
    parser.add_argument("--images", type=int, help="images a rollout, instead of --groups")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--side", type=int, default=24, help="of mid: tokens on each side of an image")
    parser.add_argument("--plot", type=Path, help="PNG file")
    args = parser.parse_args(words)
    try:
        policy = build_policy(args.size, args.side)
    except ValueError as error:
        sys.exit(f"error: {error}")

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    loads = [f"{load:.1f}" for load in os.getloadavg()]
    print(f"{args.size}, {policy.num_image_tokens} tokens, guidance {args.guidance}, {device}, load {' '.join(loads)}")
    names = "".join(f"{name:>12}" for name in ("ours, s", "loop, s", "generate, s"))
    print(f"prompts  group{names}   x loop    x gen  cpu loop  cpu gen GB: ours  loop     gen")
    rows = []
    for num_prompts in args.prompts or PROMPTS[args.size]:
        for group in [-(-args.images // num_prompts)] if args.images else args.groups or GROUPS[args.size]:
            prompt_ids = prompts_of(policy, args.size, num_prompts, group)
            row = compare(policy, prompt_ids, args.guidance, args.repeats)
            rows.append({"prompts": num_prompts, "group": group} | row)
            print(as_line(rows[-1]), flush=True)
    largest = max(rows, key=lambda row: row["images"])
    result = {f"ratio_{name}": largest[f"ratio_{name}"] for name in ALTERNATIVES} | {
        "size": args.size, "guidance": args.guidance, "repeats": args.repeats, "device": device, "load": loads,
        "tokens_per_image": policy.num_image_tokens, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "rows": rows,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
