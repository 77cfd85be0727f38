"""The phases of a training step of `StageTrainer` against the same step done the field's way (field_step.py), paired.

    python benchmarks/step.py --size tiny
    python benchmarks/step.py --size mid --repeats 5 --threads 2 --out outputs/step_mid.json
    python benchmarks/step.py --size mid --tile 256         # the fused head in smaller tiles
    python benchmarks/step.py --size mid --micro-batch 1 --no-checkpointing-ours    # our side in smaller passes

Both sides have the same weights, images, rewards, batch and optimizer, with gradient checkpointing unless told
otherwise; theirs takes the batch in one pass, ours in micro-batches where asked. The run ends with an error unless
losses agree to 1e-4 in every repeat, and gradients to 1e-4 of their length. `tiny` is the shipped model, `mid` the
one of rollout.py. In each repeat the two run one after the other in this process; seconds are medians, ratios medians
of the ratios of a repeat, theirs over ours. Processor seconds stand beside wall seconds, as other work on the machine
moves them less.

"scoring + update" is the whole step but for rollout, decoding and reward. "products" are seconds of its bare matrix
products, run once more with nothing between them: an implementation that does ours cannot beat theirs by more than
"bound". Memory is what scoring + update of the first step add at their peak to weights and optimizer state, each side
in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import reward_bound
import torch
from field_step import field_step
from memory import forget_peak, held_bytes
from stage_step import (
    Meter,
    build_trainer,
    clear,
    give_codes,
    gradients,
    prompt_ids_of,
    random_codes,
    stage_step,
    write_checkpoint,
)
from step_tables import SIDES, as_table, plot

from stage_grpo.planning.setting import Setting
from stage_grpo.planning.sizes import measure
from stage_grpo.planning.work import work
from stage_grpo.policy import scoring_head
from stage_grpo.trainer import StageTrainer

PHASES = (
    "rollout", "decode", "reward", "reference", "token ranks", "token weights", "policy forward", "backward",
    "optimizer",
)  # fmt: skip
OUTSIDE = ("rollout", "decode", "reward")
"""Of scoring + update."""
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-4
DIRECT = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
"""Makes glibc give back what is freed, so that the process's memory is what is in use."""


@dataclass(frozen=True)
class Sides:
    """A trainer, made as ours, that takes steps of both sides in turn; checkpointing is theirs in theirs."""

    trainer: StageTrainer
    with_rollout: bool
    field_checkpointing: bool

    def field(self, codes: torch.Tensor, meter: Meter, with_rollout: bool | None = None) -> float:
        self.checkpoint(self.field_checkpointing)
        loss = field_step(self.trainer, codes, meter, self.with_rollout if with_rollout is None else with_rollout)
        self.checkpoint(self.trainer.args.gradient_checkpointing)
        return loss

    def checkpoint(self, wanted: bool) -> None:
        model, options = self.trainer.model, self.trainer.args.gradient_checkpointing_kwargs
        if wanted != model.is_gradient_checkpointing:
            model.gradient_checkpointing_enable(options) if wanted else model.gradient_checkpointing_disable()


def check_agreement(sides: Sides) -> tuple[torch.Tensor, dict[str, float]]:
    """One step of each, which also warms up; gives the images of ours.

    Raises:
        ValueError: The two do not compute the same.
    """
    loss, codes = stage_step(sides.trainer, Meter())
    own = gradients(sides.trainer)
    their_loss = sides.field(codes, Meter())
    gap = ((gradients(sides.trainer) - own).norm() / own.norm()).item()
    check_loss(loss, their_loss)
    if not gap <= GRADIENT_TOLERANCE:
        raise ValueError(f"gradients differ by {gap:.2e} of their length, more than {GRADIENT_TOLERANCE}: unfair")
    return codes, {"loss": loss, "loss_difference": abs(loss - their_loss), "gradient_difference": gap}


def check_loss(ours: float, theirs: float) -> None:
    if not abs(ours - theirs) <= LOSS_TOLERANCE:
        raise ValueError(f"losses are {ours} and {theirs}, not within {LOSS_TOLERANCE}: the comparison is unfair")


def run_pair(sides: Sides) -> dict[str, Meter]:
    """Both sides once, on the images that ours just made."""
    meters = {side: Meter() for side in SIDES}
    loss, codes = stage_step(sides.trainer, meters["ours"])
    check_loss(loss, sides.field(codes, meters["field"]))
    for meter in meters.values():
        for seconds in (meter.wall, meter.cpu):
            seconds["scoring + update"] = seconds["step"] - sum(seconds[name] for name in OUTSIDE)
            seconds["other"] = seconds["step"] - sum(seconds[name] for name in PHASES)
    return meters


def products_seconds(sides: Sides, codes: torch.Tensor) -> dict[str, float]:
    """Of scoring + update of either side."""
    trainer = sides.trainer
    steps = {"ours": lambda: stage_step(trainer, Meter()), "field": lambda: sides.field(codes, Meter(), False)}
    reward_bound.TRIES = 3  # they take as long as a step each time
    seconds = {}
    for side in SIDES:
        with reward_bound.Products() as products:
            steps[side]()
        seconds[side] = products.seconds()
    return seconds


def flops(trainer: StageTrainer) -> dict[str, int]:
    """Operations of the step by the plan's own count."""
    longest = max(map(len, prompt_ids_of(trainer)))
    run = Setting(trainer.args, measure(trainer.model), 1, "ddp", 0, longest, mixed=False)
    counted = work(run)
    return {"rollout": counted.rollout_flops, "scoring + update": counted.reference_flops + counted.update_flops}


def time_sides(sides: Sides, repeats: int) -> dict[str, Any]:
    trainer = sides.trainer
    if not sides.with_rollout:
        give_codes(trainer, random_codes(trainer))
    codes, agreement = check_agreement(sides)
    runs = [run_pair(sides) for _ in range(repeats)]
    give_codes(trainer, codes)
    found: dict[str, Any] = {
        "phases": [summary(name, runs) for name in (*PHASES, "other", "scoring + update", "step")]
    }
    found |= agreement | {"flops": flops(trainer), "products_seconds": products_seconds(sides, codes)}
    total = {row["phase"]: row for row in found["phases"]}
    own, all_own = total["scoring + update"], total["step"]["seconds_ours"]
    return found | {
        "ratio_scoring_update": own["ratio"],
        "cpu_ratio_scoring_update": own["cpu_ratio"],
        "bound_scoring_update": own["seconds_field"] / found["products_seconds"]["ours"],
        "token_weights_share": total["token weights"]["seconds_ours"] / all_own,
    }


def summary(phase: str, runs: list[dict[str, Meter]]) -> dict[str, Any]:
    """Medians over repeats; a ratio only where both sides do something."""
    row: dict[str, Any] = {"phase": phase}
    for kind, key in (("wall", "seconds"), ("cpu", "cpu_seconds")):
        times = {side: [getattr(run[side], kind)[phase] for run in runs] for side in SIDES}
        row |= {f"{key}_{side}": statistics.median(times[side]) for side in SIDES}
        name = "ratio" if key == "seconds" else "cpu_ratio"
        pairs = [theirs / ours for ours, theirs in zip(*times.values()) if ours > 0 and theirs > 0]
        row[name] = statistics.median(pairs) if len(pairs) == len(runs) else None
    return row


def measure_memory(trainer: StageTrainer, side: str) -> dict[str, Any]:
    """Bytes above weights and optimizer state, of the first step in this process."""
    for parameter in (*trainer.model.parameters(), *trainer.ref_model.parameters()):
        parameter.data = parameter.data.clone()  # out of the file, of which a process only holds what it has read
    codes = random_codes(trainer)
    give_codes(trainer, codes)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    forget_peak()
    before = held_bytes()
    meter = Meter(with_memory=True)
    if side == "ours":
        stage_step(trainer, meter)
    else:
        field_step(trainer, codes, meter, with_rollout=False)
    meter.mark("between phases")
    return {"before": before, "peaks": {name: peak - before for name, peak in meter.peaks.items()}}


def memory_of_sides(args: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """Each in a fresh process."""
    words = [str(checkpoint), str(args.group), str(args.tile or 0), str(args.threads)]
    own = {"ours": [str(int(args.checkpointing_ours)), *([args.micro_batch] if args.micro_batch else [])]}
    found = {}
    for side in SIDES:
        own_words = own.get(side, [str(int(args.checkpointing))])
        command = [sys.executable, __file__, "--memory-of", side, *words, *own_words]
        done = subprocess.run(command, env={**os.environ, **DIRECT}, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"measuring the memory of {side} failed: {done.stderr[-2000:]}")
        found[side] = json.loads(done.stdout.splitlines()[-1])
        found[side]["peak"] = max(found[side]["peaks"].values())
    return found


def main_memory(
    side: str, checkpoint: str, group: str, tile: str, threads: str, checkpointing: str, micro_batch: str | None = None
) -> None:
    """What the fresh process does."""
    torch.set_num_threads(int(threads))
    set_tile(int(tile))
    with tempfile.TemporaryDirectory() as out:
        changes = {"gradient_checkpointing": checkpointing == "1", "micro_batch_size": micro_batch}
        trainer = build_trainer(Path(checkpoint), Path(out), 1, int(group), **changes)
        print(json.dumps(measure_memory(trainer, side)))


def set_tile(tokens: int | None) -> None:
    """How many tokens the fused head takes at a time on a CPU, instead of the project's choice; TRL's own is 4,096."""
    if tokens:
        scoring_head.CPU_TOKENS_A_TILE = tokens


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "mid"], default="tiny")
    parser.add_argument("--side", type=int, default=24, help="of mid: tokens on each side of an image (24)")
    parser.add_argument("--group", type=int, default=8, help="images of the one prompt (8)")
    parser.add_argument("--repeats", type=int, default=5, help="(5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rollout", action=argparse.BooleanOptionalAction, default=True, help="else: random codes")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--checkpointing-ours", action=argparse.BooleanOptionalAction, help="where ours differs")
    parser.add_argument("--micro-batch", help="images in one pass of our update, or auto; else the whole batch")
    parser.add_argument(
        "--tile", type=int, help="tokens that the fused head takes at a time, instead of the project's number"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file")
    args = parser.parse_args(words)
    if args.checkpointing_ours is None:
        args.checkpointing_ours = args.checkpointing
    torch.set_num_threads(args.threads)
    set_tile(args.tile)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "plot")}
    about = {"load": os.getloadavg(), "torch": torch.__version__, "python": platform.python_version()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(args.size, args.side, folder / "checkpoint")
        build = partial(build_trainer, checkpoint, folder / "run", 1, args.group)
        trainer = build(gradient_checkpointing=args.checkpointing_ours, micro_batch_size=args.micro_batch)
        about["tokens_per_image"] = trainer.model.num_image_tokens
        about["images_in_our_pass"] = trainer.args.per_device_train_batch_size
        sides = Sides(trainer, args.rollout, args.checkpointing)
        result = settings | about | time_sides(sides, args.repeats)
        del trainer, sides
        result["memory"] = memory_of_sides(args, checkpoint)
        clear(checkpoint)
    result["memory_ratio"] = result["memory"]["field"]["peak"] / result["memory"]["ours"]["peak"]
    tokens, load = about["tokens_per_image"], ", ".join(f"{one:.1f}" for one in about["load"])
    print(f"{args.size}, {args.group} images of {tokens} tokens, {args.threads} threads, load {load}")
    ours, field = ("recomputed" if flag else "kept" for flag in (args.checkpointing_ours, args.checkpointing))
    print(f"ours: {about['images_in_our_pass']} images in a pass, activations {ours}; field: {args.group}, {field}")
    print(as_table(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory-of"]:
        main_memory(*sys.argv[2:])
    else:
        main()
