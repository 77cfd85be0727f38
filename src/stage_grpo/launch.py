"""The subcommand ``stage launch``: check the machine, say all that is missing, then start the training processes."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from stage_grpo.command_line import ArgumentParser
from stage_grpo.config import StageConfig, parse_config
from stage_grpo.planning.disk import held_bytes
from stage_grpo.planning.plan import Plan, default_gpus, describe_short, make_plan
from stage_grpo.preflight import Demand, Missing, missing


@dataclass(frozen=True)
class Launch:
    """A run that is ready to start, or the list of what it lacks.

    Attributes:
        command: Words of the launcher's command line.
        lacking: What has to be there first.
        plan: What the run needs and does.
        num_idle: Visible GPUs of this machine that the run leaves alone.
        is_dry: Whether only the command is wanted.
    """

    command: list[str]
    lacking: list[Missing]
    plan: Plan
    num_idle: int
    is_dry: bool

    def describe(self) -> str:
        """What to print before anything starts."""
        lines = describe_short(self.plan)
        if self.num_idle > 0:
            lines.append(
                f"{self.num_idle} more GPUs are visible; --num-processes uses them, and a step then has as many times "
                "the images unless gradient_accumulation_steps is lowered as much"
            )
        if self.lacking:
            lines += [
                "",
                f"{len(self.lacking)} things are missing:" if len(self.lacking) > 1 else "one thing is missing:",
            ]
            for i, (what, remedy) in enumerate(self.lacking, start=1):
                lines += [f"  {i}. {what}", f"     -> {remedy}"]
        else:
            lines += ["", "nothing is missing"]
        if self.is_dry or not self.lacking:
            lines += ["", "the command:" if self.is_dry else "starting:", f"  {shlex.join(self.command)}"]
        return "\n".join(lines)

    def start(self) -> NoReturn:
        """Become the process that runs the launcher.

        A new program in this process, because checking may have left a context on the first GPU.
        """
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "stage_grpo.supervise", *self.command])


def prepare_launch(program: str, words: Sequence[str]) -> Launch:
    """Read ``CONFIG [launch options] [--KEY VALUE ...]`` and check what the run needs. Nothing is started.

    Args:
        program: Name shown in the help, e.g. ``"stage launch"``.
        words: Remaining words of the command line; those not known here are keys of the configuration.

    Raises:
        ValueError: If a word or a value is wrong, or the launcher's configuration cannot be used.
    """
    options, rest = _parser(program).parse_known_args(list(words))
    if not rest or rest[0].startswith("-"):
        raise ValueError("name the configuration first, e.g. configs/train/geneval.yaml")
    recipe = Path(rest.pop(0))
    config = parse_config(program, [str(recipe), *rest], lambda config: _num_processes(options, config))
    num_processes = config.world_size
    file = find_accelerate_config(options.accelerate_config or _default_accelerate(config, num_processes), recipe)
    content = _read(file)
    parallel = parallel_of(file, content)
    if parallel == "ddp" and content.get("distributed_type") == "MULTI_GPU" and num_processes < 2:
        raise ValueError(f"{file} needs two processes or more; for one, give --accelerate-config single")
    if content.get("distributed_type") == "NO" and num_processes > 1:
        raise ValueError(
            f"{file} starts one process, not {num_processes}; give --num-processes 1, or another --accelerate-config"
        )
    plan = make_plan(config, num_processes, options.gpu_memory or _gpu_memory(), parallel)
    wanted, num_visible = _gpus_here(options, config), torch.cuda.device_count()
    held = held_bytes(config, plan.work)
    demand = Demand(wanted, plan.work.disk_bytes, parallel.startswith("zero"), parallel == "zero3_offload", held)
    return Launch(
        _command(options, file, content, num_processes, recipe, rest),
        missing(config, demand, num_visible),
        plan,
        num_visible - wanted,
        options.dry_run,
    )


def _parser(program: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=program,
        usage="%(prog)s CONFIG.yaml [options] [--KEY VALUE ...]",
        description="Check what a training run needs, say what is missing, and start it, one process a GPU.",
        epilog="Any other --KEY VALUE overrides the configuration, as in stage train. On several machines, run the "
        "same command on each with --num-machines, --machine-rank and --main-process-ip.",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list what is missing and print the command; start nothing"
    )
    for name, kind, text in (
        (
            "accelerate-config",
            str,
            "file, or name in configs/accelerate (zero3; ddp with use_peft; single on one GPU)",
        ),
        ("num-processes", int, "processes on all machines together (--gpus of each)"),
        ("gpus", int, "GPUs of each machine, a process on each (8; 1 with use_peft)"),
        ("gpu-memory", float, "GB of one GPU, for the plan (as found; 80 without a GPU)"),
        ("machine-rank", int, "which machine this is, from 0"),
        ("main-process-ip", str, "address of machine 0"),
        ("main-process-port", int, "its port"),
    ):
        parser.add_argument(
            f"--{name}", f"--{name.replace('-', '_')}", dest=name.replace("-", "_"), type=kind, help=text
        )
    parser.add_argument("--num-machines", "--num_machines", type=int, default=1, help="machines (%(default)d)")
    return parser


def _gpus_here(options: Any, config: StageConfig) -> int:
    """GPUs that this machine must have.

    Raises:
        ValueError: If the counts of processes and machines do not fit.
    """
    machines, processes = options.num_machines, options.num_processes
    if machines < 1 or (processes is not None and (processes < 1 or processes % machines)):
        raise ValueError(
            f"num_processes={processes} must be a multiple of num_machines={machines}, and both at least 1"
        )
    if machines > 1 and (options.machine_rank is None or options.main_process_ip is None):
        raise ValueError(f"num_machines={machines} needs --machine-rank and --main-process-ip on each machine")
    if processes is not None:
        return processes // machines
    return options.gpus or default_gpus(config)


def _num_processes(options: Any, config: StageConfig) -> int:
    """Processes on all machines together."""
    return _gpus_here(options, config) * options.num_machines


def _default_accelerate(config: StageConfig, num_processes: int) -> str:
    if num_processes == 1:
        return "single"
    return "ddp" if config.use_peft else "zero3"


def find_accelerate_config(name: str, recipe: Path) -> Path:
    """Find the launcher's configuration: a file, or a name in ``configs/accelerate`` beside the recipe or here.

    Raises:
        ValueError: If there is none.
    """
    folders = [recipe.parent.parent / "accelerate", Path("configs/accelerate")]
    candidates = [Path(name), *(folder / f"{name}.yaml" for folder in folders)]
    found = [path for path in candidates if path.is_file()]
    if not found:
        raise ValueError(
            f"accelerate_config={name!r} is no file, and there is no {name}.yaml in "
            f"{' or '.join(str(folder) for folder in folders)}; give the path of a file"
        )
    return found[0]


def parallel_of(file: Path, content: dict[str, Any]) -> str:
    """Name how a launcher's configuration spreads a run, as ``stage plan --parallel`` does.

    Raises:
        ValueError: If this project does not know the way.
    """
    kind = content.get("distributed_type")
    if kind == "DEEPSPEED":
        zero = json.loads(_deepspeed_file(file, content).read_text(encoding="utf-8"))["zero_optimization"]
        offloads = any(
            zero.get(f"offload_{part}", {}).get("device", "none") != "none" for part in ("optimizer", "param")
        )
        return "zero2" if zero["stage"] < 3 else "zero3_offload" if offloads else "zero3"
    if kind == "FSDP" and content.get("fsdp_config", {}).get("fsdp_version") == 2:
        return "fsdp2"
    if kind in ("MULTI_GPU", "NO"):
        return "ddp"
    raise ValueError(
        f"{file} has distributed_type={kind!r}; use NO, MULTI_GPU, FSDP with fsdp_version 2, or DEEPSPEED"
    )


def _deepspeed_file(file: Path, content: dict[str, Any]) -> Path:
    """DeepSpeed's own configuration, named from the folder that the command runs in or from the repository's."""
    named = Path(str((content.get("deepspeed_config") or {}).get("deepspeed_config_file")))
    for path in (named, file.resolve().parents[2] / named):
        if path.is_file():
            return path
    raise ValueError(f"{file} names deepspeed_config_file={str(named)!r}, which is not there; correct the path")


def _read(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no configuration of accelerate; write one with `accelerate config`")
    return content


def _gpu_memory() -> float:
    """GB of the first GPU, or 80 where there is none."""
    if not torch.cuda.is_available():
        return 80.0
    return torch.cuda.get_device_properties(0).total_memory / 1e9


def _command(
    options: Any, file: Path, content: dict[str, Any], num_processes: int, recipe: Path, rest: list[str]
) -> list[str]:
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", _short(file)]
    words += ["--num_processes", str(num_processes)]
    if content.get("distributed_type") == "DEEPSPEED":
        deepspeed = _deepspeed_file(file, content)
        if not Path(str(content["deepspeed_config"]["deepspeed_config_file"])).is_file():
            words += ["--deepspeed_config_file", str(deepspeed)]
    if options.num_machines > 1:
        words += ["--num_machines", str(options.num_machines), "--machine_rank", str(options.machine_rank)]
        words += ["--main_process_ip", options.main_process_ip]
    if options.main_process_port is not None:
        words += ["--main_process_port", str(options.main_process_port)]
    return [*words, "-m", "stage_grpo.cli", "train", _short(recipe), *rest]


def _short(path: Path) -> str:
    """A path from here where it is below here, else as given: shorter to read, and to copy."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
