"""Kill a training run again and again, and compare what comes out with a run that nobody disturbed.

    python benchmarks/kill_resume.py --kills 20

Trains the tiny Janus with full STAGE, averaged weights and a rollout that feeds two optimizer steps, with a checkpoint
at every step; kills the process with SIGKILL while it starts, in a step or inside a save; starts it again each time.
Per-step numbers and all final weights must equal the straight run's to the bit.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
NUM_STEPS_A_KILL = 3
MEASURED = ("seconds/", "memory/", "step_time", "images_per_second", "train_", "total_flos")
"""Beginnings of the metrics that measure the machine rather than the training."""


def training_command(out, prompts, num_steps):
    options = {
        "output_dir": out,
        "train_prompts": prompts,
        "max_steps": num_steps,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_generations": 4,
        "ema_decay": 0.99,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "sample_steps": 0,
        "lr_scheduler_type": "cosine",
        "disable_tqdm": True,
        "resume": "auto",
    }
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "stage_grpo.cli", "train", str(ROOT / "configs/shapes/stage.yaml"), *flags]


def start(command, log):
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def newest_step(out):
    return max((int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")), default=0)


def wait_for(condition, process):
    """Poll until a condition holds; False if the process ended first."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def kill_once(command, out, log, kind, chance):
    """Start the run and kill it at a random moment of the given kind.

    Returns:
        Step it continued from, whether the kill fell inside a save, and the exit code if it ended by itself.
    """
    before = newest_step(out)
    process = start(command, log)
    if kind == "start":
        time.sleep(chance.uniform(0.5, 12))
    else:
        target = before + chance.randint(1, NUM_STEPS_A_KILL - 1)
        wait_for(lambda: newest_step(out) >= target, process)
        if kind == "save":
            wait_for(lambda: any((out / ".partial").glob("*")), process)
            time.sleep(chance.uniform(0, 0.05))
        else:
            time.sleep(chance.uniform(0, 1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    ended = None if process.returncode == -signal.SIGKILL else process.returncode
    return before, (out / ".partial").exists(), ended


def comparable(out):
    """Every logged number of each step that does not measure the machine."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if "loss" in row]
    return [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in kept]


def differing_weights(one, other):
    names = []
    for file in ("model.safetensors", "ema/model.safetensors"):
        first, second = load_file(one / file), load_file(other / file)
        names += [f"{file}: {name}" for name in first if not first[name].equal(second[name])]
        names += [f"{file}: {name}" for name in first.keys() ^ second.keys()]
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="(20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/kill_resume", help="folder, replaced")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    prompts = options.out / "prompts.jsonl"  # so few that the run passes through them several times
    prompts.write_text("".join((ROOT / "assets/shapes/train.jsonl").open().readlines()[:24]))
    num_steps = NUM_STEPS_A_KILL * options.kills
    straight, killed = (options.out / name for name in ("straight", "killed"))

    with (options.out / "log.txt").open("w") as log:
        began = time.monotonic()
        subprocess.run(
            training_command(straight, prompts, num_steps), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True
        )
        print(f"straight run: {num_steps} steps in {time.monotonic() - began:.0f} s", flush=True)
        command = training_command(killed, prompts, num_steps)
        survived = in_saves = 0
        for i in range(options.kills):
            kind = ("save", "step", "save", "start")[i % 4]
            step, in_save, ended = kill_once(command, killed, log, kind, chance)
            survived += ended is None and newest_step(killed) >= step
            in_saves += in_save
            missed = {"save": "after a save", "step": "in a step", "start": "while starting"}[kind]
            place = "inside a save" if in_save else missed
            print(f"kill {i + 1}: from step {step} to {newest_step(killed)}, {place}", flush=True)
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
    rows, straight_rows = comparable(killed), comparable(straight)
    wrong = [f"step {row['step']}" for row, other in zip(straight_rows, rows) if row != other]
    wrong += differing_weights(straight, killed)
    if len(rows) != len(straight_rows) or wrong:
        sys.exit(f"the runs differ: {len(straight_rows)} and {len(rows)} steps; {wrong[:10]}")
    print(f"{len(rows)} steps and all final weights equal the straight run's; {in_saves} kills inside a save")
    print(f"survived {survived}/{options.kills}")
    sys.exit(survived < options.kills)


if __name__ == "__main__":
    main()
