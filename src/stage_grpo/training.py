"""A training run from its configuration: load, train, save."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from PIL import Image
from transformers import AutoProcessor, TrainerCallback

from stage_grpo.config import StageConfig
from stage_grpo.data import load_rows, to_dataset
from stage_grpo.graceful_stop import GracefulStop
from stage_grpo.guarded import go_back
from stage_grpo.heldout import HeldoutEvaluation
from stage_grpo.heldout_plan import HeldoutPlan, check_heldout, plan_heldout
from stage_grpo.policy import load_policy, load_tokenizer
from stage_grpo.policy.adapters import check_no_adapter
from stage_grpo.preflight import build_rewards, check_files
from stage_grpo.resuming import begin_anew
from stage_grpo.rewards.base import Reward
from stage_grpo.run_checkpoints import PARTIAL
from stage_grpo.trainer import StageTrainer
from stage_grpo.types import PromptRow

logger = logging.getLogger(__name__)

_FINAL = ("config.json", "generation_config.json", "model*.safetensors*", "pytorch_model*.bin*", "adapter_*")
"""Files of a model or an adapter, by which it is recognised."""


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        folder: The output folder: weights and processor in transformers format beside the files of
            ``stage_grpo.run_folder``, the averaged policy in ``ema/`` if one was kept, and in ``best/`` the one that
            tested best on held-out prompts. A run that was stopped has no weights of its own there yet, but a
            checkpoint to continue from.
        stopped_by: What stopped the run before its end, e.g. ``"SIGTERM"``, or the guard and why; None if it ended by
            itself.
        step: Optimizer steps taken in all.
        only_anew: Where its checkpoints hold no optimizer to continue with: how a new run begins from the last one.
        is_main_process: Whether this process is the one to report.
    """

    folder: Path
    stopped_by: str | None
    step: int
    only_anew: str | None
    is_main_process: bool


def train(config: StageConfig, callbacks: list[TrainerCallback] | None = None) -> TrainingResult:
    """Run one training, or the rest of one, and save the policy.

    SIGTERM, SIGINT and SIGUSR1 end it after the current step, with a checkpoint. A run that its guard takes back goes
    on from a checkpoint, in the same process, with a trainer of its own.

    Args:
        config: The whole configuration.
        callbacks: Further callbacks.

    Raises:
        ValueError: If something the run needs is not configured or does not fit.
    """
    _check_config(config)
    rewards = build_rewards(config)
    train_rows = load_rows(str(config.train_prompts))
    plan = _plan_heldout(config, train_rows)
    eval_rows = load_rows(config.eval_prompts) if config.eval_prompts else []
    _check_prompts(config, train_rows, eval_rows)
    check_no_adapter("model", str(config.model))
    policy = _load_policy(config)
    processor = AutoProcessor.from_pretrained(policy.config.name_or_path)  # saved last, but better missed first
    _try_rewards(rewards, [*train_rows, *eval_rows], policy.image_size)
    parts = _Parts(config, rewards, train_rows, eval_rows, plan, processor, callbacks or [])
    with GracefulStop() as stop:
        trainer = _trainer(parts, policy, stop)
        trainer.train(resume_from_checkpoint={"auto": True, "never": None}.get(config.resume, config.resume))
        while trainer.guard.rollback is not None:
            checkpoint = go_back(trainer)
            # Chosen once: DeepSpeed's configuration holds it for as long as the process lives.
            config.micro_batch_size = trainer.args.micro_batch_size
            # Two policies with their optimizers need not fit: the first goes before the second comes.
            stop.stopped_at = policy = trainer = None
            clear_device_cache(garbage_collection=True)
            trainer = _trainer(parts, _load_policy(config), stop, has_begun=True)
            trainer.train(resume_from_checkpoint=checkpoint)
        stopped = stop.stopped_at is not None and trainer.state.global_step < trainer.state.max_steps
        if not stopped:
            _save(trainer, processor)
    trainer.accelerator.end_training()
    return TrainingResult(
        Path(str(config.output_dir)),
        (trainer.guard.stopped_by or stop.received or "a signal") if stopped else None,
        trainer.state.global_step,
        begin_anew(f"{config.output_dir}/checkpoint-{trainer.state.global_step}", config.to_json())
        if config.save_only_model
        else None,
        trainer.accelerator.is_main_process,
    )


@dataclass(frozen=True)
class _Parts:
    """What every trainer of a run is made of, beside the policy."""

    config: StageConfig
    rewards: list[Reward]
    train_rows: list[PromptRow]
    eval_rows: list[PromptRow]
    plan: HeldoutPlan | None
    processor: Any
    callbacks: list[TrainerCallback]


def _trainer(parts: _Parts, policy: Any, stop: GracefulStop, has_begun: bool = False) -> StageTrainer:
    """The trainer of a run, or of the rest of one that has begun and goes back to a checkpoint."""
    trainer = StageTrainer(
        policy,
        parts.rewards,
        parts.config,
        to_dataset(parts.train_rows),
        to_dataset(parts.eval_rows) if parts.eval_rows else None,
        load_tokenizer(policy),
        [*parts.callbacks, stop],
    )
    stop.watch(trainer.accelerator)
    trainer.guard.stop = stop
    trainer.processor = parts.processor
    if parts.plan is not None:
        trainer.add_callback(_heldout_evaluation(trainer, parts.plan, parts.processor, stop, has_begun))
    return trainer


def _load_policy(config: StageConfig) -> Any:
    return load_policy(str(config.model), config.dtype, config.attn_implementation)


def _plan_heldout(config: StageConfig, train_rows: list[PromptRow]) -> HeldoutPlan | None:
    plan = plan_heldout(config, train_rows)
    if plan is not None:
        check_heldout(plan)
    return plan


def _heldout_evaluation(
    trainer: StageTrainer, plan: HeldoutPlan, processor: Any, stop: GracefulStop, has_begun: bool
) -> HeldoutEvaluation:
    config: StageConfig = trainer.args
    kept = processor if config.keep_best else None
    return HeldoutEvaluation(trainer, plan, config.heldout_steps, kept, config.heldout_keep_images, stop, has_begun)


def _save(trainer: StageTrainer, processor: Any) -> None:
    """Save the policy into the output folder, file by file whole or not at all, and the averaged one beside it."""
    out = Path(trainer.args.output_dir)
    partial = out / PARTIAL / "final"
    trainer.save_model(str(partial))
    if trainer.averaging is not None:
        with trainer.averaged():
            trainer.save_model(str(partial / "ema"))
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        for folder in [partial, *partial.glob("ema")]:
            processor.save_pretrained(folder)
        _remove_earlier(out, partial)
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            target = out / path.relative_to(partial)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
        shutil.rmtree(partial.parent)
    trainer.accelerator.wait_for_everyone()


def _remove_earlier(out: Path, partial: Path) -> None:
    """Remove final weights of an earlier run that those in ``partial`` do not replace, e.g. an adapter's a model's."""
    for pattern in _FINAL:
        for path in [*out.glob(pattern), *out.glob(f"ema/{pattern}")]:
            if not (partial / path.relative_to(out)).exists():
                path.unlink()
    if not (partial / "ema").exists():
        shutil.rmtree(out / "ema", ignore_errors=True)


def _check_config(config: StageConfig) -> None:
    for name in ("model", "train_prompts", "rewards"):
        if getattr(config, name) is None:
            raise ValueError(f"{name} is not set; give it in the YAML file or as --{name}")
    check_files(config)
    num_gpus = torch.cuda.device_count()
    if config.world_size == 1 and num_gpus > 1 and config.n_gpu == 1:
        logger.warning(
            "one process trains on the first of %d visible GPUs; for all: stage launch CONFIG.yaml --num-processes %d",
            num_gpus,
            num_gpus,
        )


def _check_prompts(config: StageConfig, train_rows: list[PromptRow], eval_rows: list[PromptRow]) -> None:
    # TRL leaves incomplete batches out, so that with too few prompts not one step would be taken.
    needed = (config.generation_batch_size or 0) // (config.num_generations or 1)
    if len(train_rows) < needed:
        raise ValueError(
            f"train_prompts={config.train_prompts!r} holds {len(train_rows)} prompts, but one rollout takes {needed}; "
            "add prompts, or lower per_device_train_batch_size"
        )
    if config.do_eval and not eval_rows:
        raise ValueError("eval_strategy asks for evaluations, but eval_prompts is not set; set it or eval_strategy=no")


def _try_rewards(rewards: list[Reward], rows: list[PromptRow], image_size: int) -> None:
    """Check every row, and score a blank picture of one of each kind: what cannot be read shows before a rollout."""
    tried = {str(row.metadata.get("tag")): index for index, row in enumerate(rows)}.values()
    for index, row in enumerate(rows):
        for reward in rewards:
            try:
                reward.check_row(row.prompt, row.metadata)
                if index in tried:
                    reward.score([Image.new("RGB", (image_size, image_size))], [row.prompt], [row.metadata])
            except ValueError as error:
                raise ValueError(f"reward {reward.name!r} cannot score the prompt {row.prompt!r}: {error}") from error
