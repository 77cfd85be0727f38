"""Train each variant of configs/shapes/ over several seeds and print the table that docs/LOG.md keeps.

    python benchmarks/shapes_variants.py --out outputs/variants --seeds 0 1 2 --jobs 2

Every run is a `stage demo` of its own: same policy, same held-out prompts and seeds on both sides. Finished runs are
skipped, so a stopped table continues where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

VARIANTS = ("grpo", "grpo_entropy", "grpo_reweighting", "stage", "grpo_equal_strength")
LAST_STEPS = 10


def run(variant: str, seed: int, out: Path, threads: int, max_steps: int) -> None:
    folder = out / variant / str(seed)
    if (folder / "summary.json").exists():
        return
    words = ["demo", "--recipe", f"configs/shapes/{variant}.yaml", "--seed", str(seed), "--out", str(folder)]
    words += ["--max_steps", str(max_steps)]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "stage_grpo.cli", *words, "--minutes", "600"],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )
    print(f"finished {variant}, seed {seed}", flush=True)


def read(folder: Path) -> dict[str, float]:
    """Scores of one run, and its drift over the last steps."""
    summary = json.loads((folder / "summary.json").read_text())
    after = json.loads((folder / "after" / "scores.json").read_text())
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "kl" in row][-LAST_STEPS:]
    weights = [row["advantage_weights/mean"] for row in rows if "advantage_weights/mean" in row]
    return {
        "before": summary["before"]["overall"],
        "strict": summary["after"]["overall"],
        "gain": summary["gain"]["overall"],
        "low": summary["gain"]["ci95"][0],
        "high": summary["gain"]["ci95"][1],
        "heldout": after["scores"]["strict"]["heldout"],
        "graded": summary["after"]["reward"],
        "kl": float(np.mean([row["kl"] for row in last])),
        "gap": float(np.mean([row["entropy/gap"] for row in last])),
        "unique": float(np.mean([row["unique_images"] for row in last])),
        "mean_m": float(np.mean(weights)) if weights else float("nan"),
        "seconds": summary["phases"]["training"],
        "steps": summary["steps"],
    }


def table(out: Path, seeds: list[int]) -> str:
    columns = [
        "variant",
        "strict after (each seed)",
        "mean",
        "mean gain",
        "paired 95 % intervals of the gain",
        "minus GRPO (each seed)",
        "held-out only",
        "graded",
        "KL",
        "entropy gap",
        "unique images",
        "mean M",
        "s a step",
    ]
    lines = [row(columns), row(["---"] * len(columns))]
    grpo = [read(out / "grpo" / str(seed)) for seed in seeds]
    for variant in VARIANTS:
        runs = [read(out / variant / str(seed)) for seed in seeds]
        mean = {name: float(np.mean([one[name] for one in runs])) for name in runs[0]}
        cells = [
            variant,
            " / ".join(f"{one['strict']:.3f}" for one in runs),
            f"{mean['strict']:.3f}",
            f"{mean['gain']:+.3f}",
            " ".join(f"[{one['low']:+.3f}, {one['high']:+.3f}]" for one in runs),
            " / ".join(f"{one['strict'] - base['strict']:+.3f}" for one, base in zip(runs, grpo)),
            *(f"{mean[name]:.3f}" for name in ("heldout", "graded", "kl", "gap", "unique")),
            f"{mean['mean_m']:.2f}",
            f"{mean['seconds'] / mean['steps']:.2f}",
        ]
        lines.append(row(cells))
    return "\n".join(lines)


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/variants"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=100, help="steps of every run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, sharing the cores")
    options = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [(variant, seed) for seed in options.seeds for variant in VARIANTS]
        list(pool.map(lambda job: run(*job, options.out, threads, options.max_steps), jobs))
    print(table(options.out, options.seeds))
