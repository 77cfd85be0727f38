"""The phases of a training step of `StageTrainer` against the same step done the field's way (field_step.py), paired.

    python benchmarks/step.py --size tiny
    python benchmarks/step.py --size mid --repeats 5 --threads 2 --out outputs/step_mid.json
    python benchmarks/step.py --size mid --tile 256         # the fused head in smaller tiles

Both sides have the same weights, images, rewards, batch and optimizer, with gradient checkpointing; the run ends with
an error unless their losses agree to 1e-4 in every repeat, and their gradients to 1e-4 of their length. `tiny` is the
shipped model, `mid` the one of rollout.py. In each repeat the two run one after the other in this process; seconds are
medians, ratios medians of the ratios of a repeat, theirs over ours. Processor seconds stand beside wall seconds, as
other work on the machine moves them less.

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
from functools import partial
from pathlib import Path
from typing import Any

import reward_bound
import torch
from field_step import field_step
from rollout import forget_peak, memory
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

from stage_grpo import trl_seams
from stage_grpo.planning.setting import Setting
from stage_grpo.planning.sizes import measure
from stage_grpo.planning.work import work
from stage_grpo.trainer import StageTrainer

SIDES = ("ours", "field")
PHASES = (
    "rollout", "decode", "reward", "reference", "token ranks", "token weights", "policy forward", "backward",
    "optimizer",
)  # fmt: skip
OUTSIDE = ("rollout", "decode", "reward")
"""Of scoring + update."""
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-4
DIRECT = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
"""Makes glibc give back what is freed, so that the process's memory is what is in use."""


def step_of(side: str, trainer: StageTrainer, codes: torch.Tensor, meter: Meter, with_rollout: bool) -> float:
    if side == "ours":
        return stage_step(trainer, meter)[0]
    return field_step(trainer, codes, meter, with_rollout)


def check_agreement(trainer: StageTrainer, with_rollout: bool) -> tuple[torch.Tensor, dict[str, float]]:
    """One step of each, which also warms up; gives the images of ours.

    Raises:
        ValueError: The two do not compute the same.
    """
    loss, codes = stage_step(trainer, Meter())
    own = gradients(trainer)
    their_loss = field_step(trainer, codes, Meter(), with_rollout)
    gap = ((gradients(trainer) - own).norm() / own.norm()).item()
    check_loss(loss, their_loss)
    if not gap <= GRADIENT_TOLERANCE:
        raise ValueError(f"gradients differ by {gap:.2e} of their length, more than {GRADIENT_TOLERANCE}: unfair")
    return codes, {"loss": loss, "loss_difference": abs(loss - their_loss), "gradient_difference": gap}


def check_loss(ours: float, theirs: float) -> None:
    if not abs(ours - theirs) <= LOSS_TOLERANCE:
        raise ValueError(f"losses are {ours} and {theirs}, not within {LOSS_TOLERANCE}: the comparison is unfair")


def run_pair(trainer: StageTrainer, codes: torch.Tensor, with_rollout: bool) -> dict[str, Meter]:
    """Both sides once, on the images that ours just made."""
    meters = {side: Meter() for side in SIDES}
    loss, codes = stage_step(trainer, meters["ours"])
    check_loss(loss, field_step(trainer, codes, meters["field"], with_rollout))
    for meter in meters.values():
        for seconds in (meter.wall, meter.cpu):
            seconds["scoring + update"] = seconds["step"] - sum(seconds[name] for name in OUTSIDE)
            seconds["other"] = seconds["step"] - sum(seconds[name] for name in PHASES)
    return meters


def products_seconds(trainer: StageTrainer, codes: torch.Tensor) -> dict[str, float]:
    """Of scoring + update of either side."""
    reward_bound.TRIES = 3  # they take as long as a step each time
    seconds = {}
    for side in SIDES:
        with reward_bound.Products() as products:
            step_of(side, trainer, codes, Meter(), with_rollout=False)
        seconds[side] = products.seconds()
    return seconds


def flops(trainer: StageTrainer) -> dict[str, int]:
    """Operations of the step by the plan's own count."""
    longest = max(map(len, prompt_ids_of(trainer)))
    run = Setting(trainer.args, measure(trainer.model), 1, "ddp", 0, longest, mixed=False)
    counted = work(run)
    return {"rollout": counted.rollout_flops, "scoring + update": counted.reference_flops + counted.update_flops}


def time_sides(trainer: StageTrainer, repeats: int, with_rollout: bool) -> dict[str, Any]:
    if not with_rollout:
        give_codes(trainer, random_codes(trainer))
    codes, agreement = check_agreement(trainer, with_rollout)
    runs = [run_pair(trainer, codes, with_rollout) for _ in range(repeats)]
    give_codes(trainer, codes)
    found: dict[str, Any] = {
        "phases": [summary(name, runs) for name in (*PHASES, "other", "scoring + update", "step")]
    }
    found |= agreement | {"flops": flops(trainer), "products_seconds": products_seconds(trainer, codes)}
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
    before = memory("VmRSS")
    meter = Meter(with_memory=True)
    step_of(side, trainer, codes, meter, with_rollout=False)
    meter.mark("between phases")
    return {"before": before, "peaks": {name: peak - before for name, peak in meter.peaks.items()}}


def memory_of_sides(args: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """Each in a fresh process."""
    words = [str(checkpoint), str(args.group), str(args.tile or 0), str(args.threads), str(int(args.checkpointing))]
    found = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--memory-of", side, *words]
        done = subprocess.run(command, env={**os.environ, **DIRECT}, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"measuring the memory of {side} failed: {done.stderr[-2000:]}")
        found[side] = json.loads(done.stdout.splitlines()[-1])
        found[side]["peak"] = max(found[side]["peaks"].values())
    return found


def main_memory(side: str, checkpoint: str, group: str, tile: str, threads: str, checkpointing: str) -> None:
    """What the fresh process does."""
    torch.set_num_threads(int(threads))
    set_tile(int(tile))
    with tempfile.TemporaryDirectory() as out:
        trainer = build_trainer(
            Path(checkpoint), Path(out), 1, int(group), gradient_checkpointing=checkpointing == "1"
        )
        print(json.dumps(measure_memory(trainer, side)))


def set_tile(tokens: int | None) -> None:
    """How many tokens the fused head takes at a time on a CPU, instead of the project's choice; TRL's own is 4,096."""
    if tokens:
        trl_seams.CPU_TOKENS_A_TILE = tokens


def as_table(result: dict[str, Any]) -> str:
    lines = [f"{'phase':18}{'ours, s':>10}{'field, s':>10}{'ratio':>8}{'cpu ratio':>11}{'share of ours':>15}"]
    step = result["phases"][-1]["seconds_ours"]
    for row in result["phases"]:
        ratios = [f"{row[key]:.2f}" if row[key] else "-" for key in ("ratio", "cpu_ratio")]
        share = f"{100 * row['seconds_ours'] / step:.2f} %"
        cells = f"{row['seconds_ours']:10.3f}{row['seconds_field']:10.3f}{ratios[0]:>8}{ratios[1]:>11}{share:>15}"
        lines.append(f"{row['phase']:18}{cells}")
    products = result["products_seconds"]
    lines.append(f"{'bare products':18}{products['ours']:10.3f}{products['field']:10.3f}   (of scoring + update)")
    rate = result["flops"]["scoring + update"] / products["ours"] / 1e9
    lines.append(
        f"scoring + update: {result['ratio_scoring_update']:.2f} x, at most {result['bound_scoring_update']:.2f} x by "
        f"the products, at {rate:.0f} GFLOP/s; token weights {100 * result['token_weights_share']:.2f} % of our step"
    )
    lines.append(f"{'peak memory, MB':18}{'ours':>10}{'field':>10}   (above weights and optimizer state)")
    ours, field = (result["memory"][side] for side in SIDES)
    for phase in sorted(ours["peaks"].keys() | field["peaks"].keys()):
        lines.append(f"{phase:18}{ours['peaks'].get(phase, 0) / 1e6:10.0f}{field['peaks'].get(phase, 0) / 1e6:10.0f}")
    lines.append(f"{'worst':18}{ours['peak'] / 1e6:10.0f}{field['peak'] / 1e6:10.0f}{result['memory_ratio']:8.2f}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    starts = dict.fromkeys(SIDES, 0.0)
    for row in result["phases"][: len(PHASES) + 1]:
        seconds = [max(0.0, row[f"seconds_{side}"]) for side in SIDES]
        axes.barh(SIDES, seconds, left=list(starts.values()), label=row["phase"])
        starts = {side: start + more for (side, start), more in zip(starts.items(), seconds)}
    axes.set(xlabel="seconds a step")
    axes.invert_yaxis()
    figure.legend(loc="outside right center", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "mid"], default="tiny")
    parser.add_argument("--side", type=int, default=24, help="of mid: tokens on each side of an image (24)")
    parser.add_argument("--group", type=int, default=8, help="images of the one prompt (8)")
    parser.add_argument("--repeats", type=int, default=5, help="(5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rollout", action=argparse.BooleanOptionalAction, default=True, help="else: random codes")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--tile", type=int, help="tokens that the fused head takes at a time, instead of the project's number"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    set_tile(args.tile)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "plot")}
    about = {"load": os.getloadavg(), "torch": torch.__version__, "python": platform.python_version()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(args.size, args.side, folder / "checkpoint")
        build = partial(build_trainer, checkpoint, folder / "run", 1, args.group)
        trainer = build(gradient_checkpointing=args.checkpointing)
        about["tokens_per_image"] = trainer.model.num_image_tokens
        result = settings | about | time_sides(trainer, args.repeats, args.rollout)
        del trainer
        result["memory"] = memory_of_sides(args, checkpoint)
        clear(checkpoint)
    result["memory_ratio"] = result["memory"]["field"]["peak"] / result["memory"]["ours"]["peak"]
    tokens, load = about["tokens_per_image"], ", ".join(f"{one:.1f}" for one in about["load"])
    print(f"{args.size}, {args.group} images of {tokens} tokens, {args.threads} threads, load {load}")
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
