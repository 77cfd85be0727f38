"""A training step whose rewards begin beside one another and beside the reference's forward, against rewards in turn.

    python benchmarks/overlap.py
    python benchmarks/overlap.py --size mid --repeats 5 --threads 2 --out outputs/overlap.json

Two rewards wait --wait seconds each, as for a server, and give fixed scores. "plain" ones are rewards like any other;
"asynchronous" ones say that they wait, as rewards over HTTP do, so that TRL lets them wait together in any case. In
each repeat the same step is taken both ways, one after the other in this process, with the same images; the run ends
with an error unless both losses are the same number. Seconds are medians, "saved" and the ratio medians of those of a
repeat. In turn, a step waits twice --wait for plain rewards and once for asynchronous ones; with overlap it waits once
less the seconds of the reference. No step can save more than the difference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import stage_step
import torch
from PIL import Image

from stage_grpo.rewards.base import Reward
from stage_grpo.trainer import StageTrainer

PHASES = ("step", "reward", "reference")
WAYS = {"in_turn": False, "overlap": True}


class Waits(Reward):
    """Waits and gives fixed scores.

    Args:
        name: Of the reward.
        seconds: To wait.
    """

    def __init__(self, name: str, seconds: float):
        super().__init__()
        self.name, self.seconds = name, seconds

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[dict]) -> list[float]:
        time.sleep(self.seconds)
        return stage_step.fixed_reward(images, prompts, metadata)


class WaitsElsewhere(Waits):
    asynchronous = True


KINDS = {"plain": Waits, "asynchronous": WaitsElsewhere}


def build_trainer(kind: str, seconds: float, checkpoint: Path, out: Path, *sizes: int) -> StageTrainer:
    rewards = [KINDS[kind](name, seconds) for name in ("one", "two")]
    with mock.patch.object(stage_step, "fixed_reward", rewards):
        return stage_step.build_trainer(checkpoint, out, *sizes, overlap_rewards=True)


def take_step(trainer: StageTrainer, ahead: bool) -> tuple[dict[str, float], float]:
    """Seconds and loss of the first step; it can be taken again, as the learning rate is 0."""
    trainer.reward_threads.ahead = ahead
    trainer._rollouts = (True, 0, 0)  # the same images,
    torch.manual_seed(0)  # in the same order
    meter = stage_step.Meter()
    loss, _ = stage_step.stage_step(trainer, meter)
    return {phase: meter.wall[phase] for phase in PHASES}, loss


def compare(trainer: StageTrainer, repeats: int) -> dict[str, Any]:
    """Both ways in every repeat.

    Raises:
        ValueError: The two do not compute the same.
    """
    take_step(trainer, ahead=False)  # warms up; only now rewards may begin ahead
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        losses = {}
        for way, ahead in WAYS.items():
            seconds, losses[way] = take_step(trainer, ahead)
            runs[way].append(seconds)
        if losses["in_turn"] != losses["overlap"]:
            raise ValueError(f"losses are {losses}, which should be equal")
    found: dict[str, Any] = {
        f"{phase}_seconds_{way}": statistics.median(run[phase] for run in runs[way])
        for way in WAYS
        for phase in PHASES
    }
    pairs = list(zip(runs["in_turn"], runs["overlap"]))
    return found | {
        "saved_seconds": statistics.median(one["step"] - other["step"] for one, other in pairs),
        "ratio": statistics.median(one["step"] / other["step"] for one, other in pairs),
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "mid"), default="tiny")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--wait", type=float, default=0.3, help="seconds that each reward waits")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = stage_step.write_checkpoint(args.size, 24, Path(folder) / "checkpoint")
        for kind in KINDS:
            trainer = build_trainer(kind, args.wait, checkpoint, Path(folder) / kind, args.prompts, args.group)
            rows.append({"rewards": kind, **compare(trainer, args.repeats)})
            print(
                "{rewards:13} in turn {step_seconds_in_turn:.3f} s (rewards {reward_seconds_in_turn:.3f}), "
                "overlap {step_seconds_overlap:.3f} s (rewards {reward_seconds_overlap:.3f}), "
                "reference {reference_seconds_in_turn:.3f} s, saved {saved_seconds:.3f} s, "
                "ratio {ratio:.2f}".format(**rows[-1])
            )
    options = {name: value for name, value in vars(args).items() if name != "out"}
    machine = {"cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"options": options, "machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
