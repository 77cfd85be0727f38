"""What a run needs of this machine before it starts: files, weights, rewards, packages, GPUs, disk."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from stage_grpo.checkpoints.cache import is_original, remedy_on_the_hub
from stage_grpo.config import StageConfig
from stage_grpo.heldout_plan import lacking_for, plan_heldout
from stage_grpo.policy.adapters import is_adapter
from stage_grpo.rewards.base import Reward, check_names
from stage_grpo.rewards.registry import REWARDS, build_ready_reward, lacking

PROMPT_COMMANDS = {
    "geneval_train.jsonl": "stage data build-geneval --ratio 0:1:7:1:4:5 --num 12800 --seed 0 --repeat --out {path}",
    "t2i_r1/train.jsonl": "stage data fetch t2i_r1 --out {folder}",
    "ocr_train.txt": "curl -L --create-dirs -o {path} https://raw.githubusercontent.com/yifan123/flow_grpo/"
    "ac4c86e8cae021841f1fde853d340e0db67690dd/dataset/ocr/train.txt",
}
"""How to get the prompt files that the shipped recipes name, by the end of their path."""


class Missing(NamedTuple):
    """One thing that a run needs and this machine lacks, and how to get it."""

    what: str
    remedy: str


class Demand(NamedTuple):
    """What a run asks of the machine beyond its files.

    Attributes:
        num_gpus: Processes on this machine, one GPU each.
        disk_bytes: What the output folder may take.
        uses_deepspeed: Whether DeepSpeed spreads it.
        offloads: Whether DeepSpeed keeps weights and optimizer in the machine's memory.
        held_bytes: How much of ``disk_bytes`` the output folder holds already.
    """

    num_gpus: int
    disk_bytes: int
    uses_deepspeed: bool
    offloads: bool
    held_bytes: int = 0


def check_files(config: StageConfig) -> None:
    """Refuse paths that cannot be what they should be.

    Raises:
        ValueError: If a path is missing or of the wrong kind; the message names key, path and remedy.
    """
    for name in ("train_prompts", "eval_prompts"):
        value = getattr(config, name)
        if value is not None and not Path(value).is_file():
            raise ValueError(f"{name}={value!r} is not a readable file; give a .txt, .jsonl or .csv of prompts")
    if config.output_dir and Path(config.output_dir).is_file():
        raise ValueError(f"output_dir={config.output_dir!r} is a file; name a folder, which need not exist")


def build_rewards(config: StageConfig) -> list[Reward]:
    """Build the rewards of a run, each with its options, and make sure that nothing they need is missing.

    Raises:
        ValueError: If a reward is unknown or cannot be imported, rejects its options, lacks weights, a package or its
            server, or has the name of another.
    """
    options: dict[str, Any] = config.reward_options if isinstance(config.reward_options, dict) else {}
    rewards = [build_ready_reward(name, options.get(name)) for name in config.rewards or []]
    check_names(rewards)
    return rewards


def missing(config: StageConfig, demand: Demand, num_visible_gpus: int) -> list[Missing]:
    """Everything that stands between a configuration and its first step, in the order in which to get it.

    Nothing is downloaded and no GPU is touched.

    Args:
        config: The configuration.
        demand: What it asks of the machine, see :mod:`stage_grpo.planning`.
        num_visible_gpus: GPUs of this machine.
    """
    found = [
        *_gpus(demand.num_gpus, num_visible_gpus),
        *_packages(config, demand),
        *_weights("model", config.model),
        *(_weights("ref_model", config.ref_model) if config.ref_model else ()),
        *_prompts(config),
        *_rewards(config),
        *_heldout(config),
        *_disk(config, demand),
    ]
    return list(dict.fromkeys(found))


def _gpus(wanted: int, visible: int) -> Iterator[Missing]:
    if visible >= wanted:
        return
    fewer = f"--num-processes {visible} for fewer processes, or " if visible else ""
    yield Missing(
        f"{wanted} GPUs are wanted, {visible or 'none'} visible",
        f"run on a machine with {wanted}; {fewer}`stage plan` says what fits; LoRA needs one: "
        "configs/train/lora_1gpu.yaml (80 GB), lora_1gpu_1b.yaml (24 GB)",
    )


def _packages(config: StageConfig, demand: Demand) -> Iterator[Missing]:
    if demand.uses_deepspeed and not _installed("deepspeed"):
        yield Missing(
            "DeepSpeed is not installed", "pip install 'stage-grpo[deepspeed]', or --accelerate-config fsdp2"
        )
    if demand.offloads:  # DeepSpeed compiles its optimizer for CPUs when it is first used
        for program, remedy in (
            ("g++", "install a C++ compiler, e.g. apt install g++"),
            ("ninja", "pip install ninja"),
        ):
            if shutil.which(program) is None:
                yield Missing(f"{program} is not on the PATH; DeepSpeed's offload compiles with it", remedy)
    if config.attn_implementation == "flash_attention_2" and not _installed("flash_attn"):
        yield Missing("flash-attn is not installed", "pip install flash-attn, or leave attn_implementation out")
    trackers = config.report_to if isinstance(config.report_to, list) else [config.report_to]
    for name in ("tensorboard", "wandb"):
        if name in trackers and not _installed(name):
            yield Missing(f"{name} is not installed", f"pip install 'stage-grpo[{name}]', or --report_to none")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _weights(key: str, model: str | None) -> Iterator[Missing]:
    if model is None:
        yield Missing(f"{key} is not set", f"--{key} FOLDER_OR_HUB_NAME")
        return
    folder = Path(model)
    if folder.is_dir():
        if is_adapter(folder):
            if key == "model":
                remedy = f"stage merge {model} {model}-merged, then --{key} {model}-merged"
                yield Missing(f"{key} {model} is a LoRA adapter", remedy)
        elif lacking := _lacking(folder):
            yield Missing(f"{key} {model} lacks {', '.join(lacking)}", f"fetch or convert it again, or --{key} PATH")
        return
    try:
        snapshot = Path(snapshot_download(model, local_files_only=True))
        lacking = _lacking(snapshot)
    except HFValidationError:
        yield Missing(f"{key} {model} is no folder", f"--{key} PATH of a checkpoint folder")
        return
    except LocalEntryNotFoundError:
        snapshot, lacking = folder, ["everything"]
    if lacking:
        yield Missing(
            f"the weights of {key} {model} are neither a folder nor whole in the hub cache",
            f"hf download {model}, or --{key} PATH of a folder with them (DeepSeek's own format does as well)",
        )
    elif is_original(snapshot):
        yield Missing(f"{key} {model} is a hub name in DeepSeek's own format", remedy_on_the_hub(model, key))


def _lacking(folder: Path) -> list[str]:
    """Names of a checkpoint's files that are not there."""
    if not (folder / "config.json").is_file():
        return ["config.json"]
    for index in sorted(folder.glob("*.index.json")):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(name for name in shards if not (folder / name).is_file())
    whole = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return [] if whole else ["its weights (*.safetensors)"]


def _prompts(config: StageConfig) -> Iterator[Missing]:
    for key in ("train_prompts", "eval_prompts"):
        value = getattr(config, key)
        if value is None:
            if key == "train_prompts":
                yield Missing(f"{key} is not set", f"--{key} FILE (.txt, .jsonl or .csv)")
            continue
        path = Path(value)
        if path.is_file():
            continue
        commands = [command for end, command in PROMPT_COMMANDS.items() if path.as_posix().endswith(end)]
        words = {"path": shlex.quote(str(path)), "folder": shlex.quote(str(path.parent))}
        remedy = commands[0].format(**words) if commands else f"--{key} FILE; `stage data list` shows official sets"
        yield Missing(f"{key} {value} is not there", remedy)


def _rewards(config: StageConfig) -> Iterator[Missing]:
    if not config.rewards:
        yield Missing("rewards is not set", f"--rewards NAME, one of {', '.join(REWARDS)}, or module:function")
    for name in config.rewards or []:
        options = config.reward_options if isinstance(config.reward_options, dict) else {}
        yield from (Missing(what, remedy) for what, remedy in lacking(name, options.get(name)))


def _heldout(config: StageConfig) -> Iterator[Missing]:
    try:
        plan = plan_heldout(config)
    except ValueError as error:
        what, _, remedy = str(error).rpartition("; ")
        yield Missing(f"heldout_benchmark {config.heldout_benchmark}: {what}", remedy.removeprefix("get it by: "))
        return
    if plan is not None:
        yield from (Missing(what, remedy) for what, remedy in lacking_for(plan))


def _disk(config: StageConfig, demand: Demand) -> Iterator[Missing]:
    folder = Path(str(config.output_dir)).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        yield Missing(f"output_dir {config.output_dir} cannot be made: {folder} is a file", "--output_dir FOLDER")
        return
    free = shutil.disk_usage(folder).free
    if free + demand.held_bytes < demand.disk_bytes:
        held = f" ({demand.held_bytes / 1e9:,.0f} GB of it are there)" if demand.held_bytes else ""
        yield Missing(
            f"{config.output_dir} may take {demand.disk_bytes / 1e9:,.0f} GB{held}, and {free / 1e9:,.0f} GB are free",
            "--output_dir on a larger disk, a lower --save_total_limit, or --save_strategy no",
        )
