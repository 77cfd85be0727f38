"""The plan of a run: does it fit, what does it do, and what would help."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from stage_grpo.config import StageConfig
from stage_grpo.micro_batches import AUTO, divisors
from stage_grpo.planning.memory import ALWAYS, PHASES, RESERVE, Component, components, host_bytes, peak, reward_bytes
from stage_grpo.planning.micro_batch import in_passes_of, largest_that_fits
from stage_grpo.planning.setting import PARALLEL, Setting
from stage_grpo.planning.sizes import PolicySizes, policy_sizes
from stage_grpo.planning.work import Work, work

PROMPT_TOKENS = 64
"""Length that a prompt with its template is taken to have; GenEval's have about 30."""


@dataclass(frozen=True)
class Plan:
    """What a run needs and does.

    Attributes:
        setting: The run.
        parts: What takes memory on each GPU.
        work: Images, operations, disk.
    """

    setting: Setting
    parts: list[Component]
    work: Work

    @property
    def peak(self) -> int:
        """Bytes on each GPU at the worst moment."""
        return peak(self.parts)[0]

    @property
    def fits(self) -> bool:
        """Whether that is no more than the GPU has."""
        return self.peak <= self.setting.gpu_bytes


def make_plan(
    config: StageConfig,
    num_gpus: int | None = None,
    gpu_memory: float = 80.0,
    parallel: str | None = None,
    num_prompt_tokens: int = PROMPT_TOKENS,
) -> Plan:
    """Plan a run without starting anything.

    Args:
        config: The configuration, its batches counted for these processes, see ``config.parse_config``.
        num_gpus: Processes, one GPU each; by default :func:`default_gpus`.
        gpu_memory: Memory of one GPU in GB (1e9 bytes).
        parallel: One of ``PARALLEL``; by default :func:`default_parallel`.
        num_prompt_tokens: Length of the longest prompt with its template.

    Raises:
        ValueError: If a value is impossible, or the sizes of the model are not known.
    """
    num_gpus = default_gpus(config) if num_gpus is None else num_gpus
    parallel = default_parallel(config, num_gpus) if parallel is None else parallel
    if parallel not in PARALLEL:
        raise ValueError(f"parallel={parallel!r} is unknown; use one of {', '.join(PARALLEL)}")
    if num_gpus < 1 or gpu_memory <= 0 or num_prompt_tokens < 1:
        raise ValueError(
            f"gpus={num_gpus}, gpu_memory={gpu_memory} and prompt_tokens={num_prompt_tokens} must be above 0"
        )
    if config.model is None:
        raise ValueError("model is not set; give it in the YAML file or as --model")
    # Where there is no GPU, the configuration resolves to what fits a CPU: there the plan is for another machine.
    mixed = bool(config.bf16 or config.fp16 or not torch.cuda.is_available())
    sizes = policy_sizes(config.model, config.dtype)
    run = Setting(config, sizes, num_gpus, parallel, gpu_memory * 1e9, num_prompt_tokens, mixed)
    group = int(config.num_generations or 1)
    if num_gpus * run.num_rollout_rows % group:
        raise ValueError(
            f"{num_gpus} GPUs x {run.num_rollout_rows} images are no multiple of num_generations={group}; change "
            "per_device_train_batch_size"
        )
    return _planned(_in_micro_batches(run))


def _in_micro_batches(run: Setting) -> Setting:
    size = run.config.micro_batch_size
    if size is None:
        return run
    if size == AUTO:
        size = largest_that_fits(run, run.gpu_bytes - RESERVE - reward_bytes(run)) or 1
    return in_passes_of(run, int(size))


def default_gpus(config: StageConfig) -> int:
    """GPUs that a recipe is meant for unless told otherwise: one with LoRA, else the eight of the publications."""
    return 1 if config.use_peft else 8


def default_parallel(config: StageConfig, num_gpus: int) -> str:
    """How a run is spread unless told otherwise: ZeRO-3, but plain copies where one GPU holds everything."""
    return "ddp" if config.use_peft or num_gpus == 1 else "zero3"


def _planned(setting: Setting) -> Plan:
    return Plan(setting, components(setting), work(setting))


def levers(plan: Plan) -> list[tuple[str, int]]:
    """Changes that would lower the peak, with the peak each leads to, the largest effect first."""
    found = [(name, _planned(changed).peak) for name, changed in _changes(plan.setting)]
    return sorted((lever for lever in found if lever[1] < plan.peak), key=lambda lever: lever[1])


def _changes(run: Setting) -> Iterator[tuple[str, Setting]]:
    config = run.config
    for parallel in ("zero3", "zero3_offload"):
        if run.num_gpus > 1 and run.parallel not in (parallel, "zero3_offload"):
            yield f"--parallel {parallel}", dataclasses.replace(run, parallel=parallel)
    if not config.gradient_checkpointing:
        yield "--gradient_checkpointing true", _with(run, gradient_checkpointing=True)
    for size in divisors(config.per_device_train_batch_size)[-2:-1]:
        yield f"--micro_batch_size {size}", in_passes_of(run, size)
    if config.dtype == "float32" and (config.use_peft or run.parallel in ("zero3", "zero2", "fsdp2")):
        sizes: PolicySizes = policy_sizes(str(config.model), "bfloat16")
        yield "--dtype bfloat16", dataclasses.replace(_with(run, dtype="bfloat16"), sizes=sizes)
    if not config.use_peft:
        yield "--use_peft true", _with(run, use_peft=True)
    if run.is_sharded or run.parallel == "zero2":
        yield f"--gpus {2 * run.num_gpus}", dataclasses.replace(run, num_gpus=2 * run.num_gpus)


def _with(run: Setting, **changes: Any) -> Setting:
    config = copy.copy(run.config)
    for name, value in changes.items():
        setattr(config, name, value)
    return dataclasses.replace(run, config=config)


def warnings(plan: Plan) -> list[str]:
    """What the user should know before starting: sentences, each with its remedy."""
    run, found = plan.setting, []
    if not plan.fits:
        helpful = levers(plan)
        best = f"; the largest lever is {helpful[0][0]}: {_gb(helpful[0][1])}" if helpful else ""
        found.append(f"it does not fit: {_gb(plan.peak)} on a GPU of {_gb(run.gpu_bytes)}{best}")
        enough = [name for name, size in helpful if size <= run.gpu_bytes]
        if len(enough) > 1:
            found.append("each of these alone would make it fit: " + "; ".join(enough))
    if run.trainable_bytes == 2 and not run.is_zero:
        found.append(
            f"weights and Adam's states would be kept in bfloat16 under {run.parallel}, where small updates are "
            "rounded away; set dtype float32 (a GPU computes in bfloat16 all the same), or use --parallel zero3"
        )
    return found


def describe(plan: Plan) -> str:
    """The plan as text, for people."""
    run = plan.setting
    config, name = run.config, {ALWAYS: "always"}
    spread = run.parallel if run.num_gpus > 1 or run.parallel != "ddp" else "one process"
    lines = [
        f"{config.model}, {run.num_gpus} x {_gb(run.gpu_bytes)}, {spread}",
        f"{run.sizes.total:,} parameters, {run.trainable:,} trained, in {config.dtype} ({run.sizes.source})",
        *_passes(run),
        "",
        f"{'memory of each GPU':<36}{'GB':>8}  when",
    ]
    for part in sorted(plan.parts, key=lambda part: (ALWAYS, *PHASES).index(part.phase)):
        lines.append(f"{part.name:<36}{part.size / 1e9:>8.2f}  {name.get(part.phase, part.phase):<15} {part.how}")
    size, phase = peak(plan.parts)
    share = f"{100 * size / run.gpu_bytes:.0f} % of {_gb(run.gpu_bytes)}"
    lines += [f"{'peak':<36}{size / 1e9:>8.2f}  in {phase}, {share}", *_host(run), "", *_totals(plan)]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in warnings(plan))])


def describe_short(plan: Plan) -> list[str]:
    """The plan in a few lines."""
    run, (size, phase) = plan.setting, peak(plan.parts)
    spread = f"{run.num_gpus} processes, {run.parallel}" if run.num_gpus > 1 else "one process"
    return [
        f"{run.config.model}: {spread}, about {_gb(size)} of {_gb(run.gpu_bytes)} a GPU (in {phase})",
        f"{_number(plan.work.images_per_step)} images of {_number(plan.work.prompts_per_step)} prompts a step, "
        f"up to {_gb(plan.work.disk_bytes)} in {run.config.output_dir}",
        *(f"warning: {warning}" for warning in warnings(plan)),
    ]


def _passes(run: Setting) -> list[str]:
    config = run.config
    if config.micro_batch_size is None:
        return []
    images = f"{config.gradient_accumulation_steps} x {config.micro_batch_size} images on each GPU"
    return [f"micro_batch_size {config.micro_batch_size}: a step takes {images}"]


def _host(run: Setting) -> list[str]:
    size = host_bytes(run)
    return [f"{'memory of the machines, in all':<36}{size / 1e9:>8.2f}"] if size else []


def _totals(plan: Plan) -> list[str]:
    run, done = plan.setting, plan.work
    steps, rollouts = done.num_steps, done.num_rollouts
    table = [
        ("prompts", done.prompts_per_rollout),
        ("images", done.images_per_rollout),
        ("image tokens", done.images_per_rollout * run.sizes.policy.num_image_tokens),
    ]
    lines = [f"{'':<20}{'a step':>16}{'the run':>20}"]
    for name, each in table:
        whole = "unknown" if rollouts is None else f"{each * rollouts:,}"
        lines.append(f"{name:<20}{_number(each * done.rollouts_per_step):>16}{whole:>20}")
    for name, each in (
        ("PFLOP", done.flops_per_step),
        ("  rollout", done.rollout_flops),
        ("  reference", done.reference_flops),
        ("  update", done.update_flops),
    ):
        whole = "unknown" if steps is None else f"{each * steps / 1e15:,.0f}"
        lines.append(f"{name:<20}{each / 1e15:>16,.2f}{whole:>20}")
    count = "unknown until train_prompts is there" if steps is None else f"{steps:,}"
    disk = (
        f"{done.num_checkpoints} checkpoints x {_gb(done.checkpoint_bytes)} + {_gb(done.final_bytes)} at the end"
        f" = {_gb(done.disk_bytes)}"
    )
    return [f"steps: {count}", *lines, f"disk: {disk}"]


def _number(mean: Fraction) -> str:
    return f"{float(mean):,.2f}".rstrip("0").rstrip(".")


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
