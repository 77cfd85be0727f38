"""Cost of a training step against images a prompt, prompts, tokens an image and processes, and where it is no line.

    python benchmarks/scaling.py --repeats 5 --threads 1 --out outputs/scaling.json
    python benchmarks/scaling.py --axes tokens --sides 6 12 24

A tiny Janus with random weights takes whole steps of `StageTrainer`; seconds are medians. On one thread they are
processor seconds, which other work on the machine moves less; those of the axis "processes" are always wall seconds.
One number changes at a time, the others stay at one prompt, 8 images and 36 tokens. The exponent is the slope of
log(seconds) over log(number): 1 is a line through 0. "first" and "last" are the slopes between the two smallest and
between the two largest numbers: fixed costs weigh on the first. Processes share the images of a step (16, of two
prompts) and have one thread each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from stage_step import Meter, build_trainer, stage_step, write_checkpoint

ROOT = Path(__file__).parents[1]
PHASES = ("rollout", "decode", "reference", "token weights", "policy forward", "backward", "optimizer", "step")
BASE = {"prompts": 1, "group": 8, "side": 6}
EXPECTED = {
    "group": {
        "rollout": "0 to 1: a decoding step reads every weight and starts every kernel once, however many rows it has",
        "decode": "1",
        "reference": "1",
        "token weights": "up to 2 in the G x G pairs, but starting the kernels is most of it",
        "policy forward": "1",
        "backward": "1",
        "optimizer": "0: it depends on the weights alone",
        "step": "below 1, by the rollout and the optimizer",
    },
    "prompts": {
        "rollout": "0 to 1, as with images a prompt; each prompt is run once besides",
        "token weights": "1: groups do not meet",
        "optimizer": "0",
    },
    "tokens": {
        "rollout": "1 and, by attention to all earlier tokens, towards 2",
        "decode": "1, and the attention in the VQ decoder's middle towards 2",
        "reference": "1 and, by attention, towards 2",
        "token weights": "1",
        "policy forward": "1 and, by attention, towards 2",
        "backward": "1 and, by attention, towards 2",
        "optimizer": "0",
        "step": "1 and more, by attention",
    },
    "processes": {
        "rollout": "0 to -1: fewer rows a process, but every process reads all weights and starts all kernels",
        "update": "-1, but gradients are summed over the processes and both share caches and memory",
        "step": "between 0 and -1",
    },
}
"""Exponents that arithmetic leads to expect, and why; phases not named are as with images a prompt."""


def seconds_of_step(checkpoint: Path, num_prompts: int, group: int, repeats: int) -> dict[str, float]:
    """Medians by phase."""
    with tempfile.TemporaryDirectory() as out:
        trainer = build_trainer(checkpoint, Path(out), num_prompts, group)
        stage_step(trainer, Meter())  # warms up
        runs = []
        for _ in range(repeats):
            runs.append(Meter())
            stage_step(trainer, runs[-1])
    kind = "cpu" if torch.get_num_threads() == 1 and not torch.cuda.is_available() else "wall"
    return {phase: statistics.median(getattr(run, kind)[phase] for run in runs) for phase in PHASES}


def scale(axis: str, numbers: Sequence[int], folder: Path, repeats: int) -> list[dict[str, Any]]:
    """One row a number, of images a prompt, of prompts, or of tokens on each side of an image."""
    rows = []
    for number in numbers:
        setting = BASE | {"side" if axis == "tokens" else axis: number}
        checkpoint = folder / f"grid{setting['side']}"
        if not checkpoint.exists():
            write_checkpoint("grid", setting["side"], checkpoint)
        seconds = seconds_of_step(checkpoint, setting["prompts"], setting["group"], repeats)
        rows.append({"number": number**2 if axis == "tokens" else number, "seconds": seconds})
    return rows


def scale_processes(numbers: Sequence[int], folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Whole runs, started as users start them; the numbers are those that the trainer logs."""
    checkpoint = folder / "processes"
    write_checkpoint("grid", BASE["side"], checkpoint)
    rows = []
    for number in numbers:
        out = folder / f"run{number}"
        launch(number, [str(checkpoint), str(out), str(16 // number), str(repeats + 1)])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "step_time" in line][1:]
        keys = {"rollout": "seconds/rollout", "update": "seconds/update", "step": "step_time"}
        seconds = {phase: statistics.median(step[key] for step in steps) for phase, key in keys.items()}
        rows.append({"number": number, "seconds": seconds})
    return rows


def launch(num_processes: int, words: list[str]) -> None:
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/ddp.yaml")]
        command += ["--num_processes", str(num_processes), "--main_process_port", "0"]
    surroundings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_TORCH_DEVICE": "cpu"}
    done = subprocess.run(
        [*command, __file__, "--worker", *words], env={**os.environ, **surroundings}, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"a run on {num_processes} processes failed: {done.stderr[-3000:]}")


def main_worker(checkpoint: str, out: str, batch: str, max_steps: str) -> None:
    """One process of a run: a few steps of 16 images of two prompts."""
    backend = "gloo" if "WORLD_SIZE" in os.environ else None
    changes = {"per_device_train_batch_size": int(batch), "max_steps": int(max_steps), "ddp_backend": backend}
    build_trainer(Path(checkpoint), Path(out), 2, 8, gradient_checkpointing=False, bf16=False, **changes).train()
    if backend:
        torch.distributed.destroy_process_group()


def slope(rows: Sequence[dict[str, Any]], phase: str) -> float:
    """Of log(seconds) over log(number), by least squares."""
    if len(rows) < 2:
        return math.nan
    numbers, seconds = ([math.log(x) for x in xs] for xs in zip(*((r["number"], r["seconds"][phase]) for r in rows)))
    return statistics.linear_regression(numbers, seconds).slope


def as_table(axis: str, rows: Sequence[dict[str, Any]]) -> str:
    heads = "".join(f"{row['number']:>9}" for row in rows)
    lines = [f"{axis:16}{heads}{'exponent':>10}{'first':>7}{'last':>7}  expected"]
    for phase in rows[0]["seconds"]:
        cells = "".join(f"{row['seconds'][phase]:9.4f}" for row in rows)
        slopes = slope(rows, phase), slope(rows[:2], phase), slope(rows[-2:], phase)
        expected = EXPECTED[axis].get(phase) or EXPECTED["group"][phase]
        lines.append(f"{phase:16}{cells}{slopes[0]:10.2f}{slopes[1]:7.2f}{slopes[2]:7.2f}  {expected}")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(EXPECTED), default=list(EXPECTED))
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 8, 16, 32], help="images a prompt")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 2, 4, 8], help="prompts a step")
    parser.add_argument("--sides", type=int, nargs="+", default=[6, 12, 24], help="tokens on each side of an image")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="divisors of 16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"tiny Janus, random weights, {args.threads} threads, load {load}; seconds")
    result: dict[str, Any] = {"load": load, "threads": args.threads, "repeats": args.repeats, "axes": {}}
    with tempfile.TemporaryDirectory() as name:
        for axis in args.axes:
            if axis == "processes":
                rows = scale_processes(args.processes, Path(name), args.repeats)
            else:
                numbers = {"group": args.groups, "prompts": args.prompts, "tokens": args.sides}[axis]
                rows = scale(axis, numbers, Path(name), args.repeats)
            exponents = {phase: slope(rows, phase) for phase in rows[0]["seconds"]}
            result["axes"][axis] = {"rows": rows, "exponents": exponents}
            print(as_table(axis, rows), flush=True)
    if args.out:
        about = {"torch": torch.__version__, "python": platform.python_version()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result | about, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        main_worker(*sys.argv[2:])
    else:
        main()
