"""Where a run continues from, and what is different about it this time."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stage_grpo.run_checkpoints import defect, newest_whole

logger = logging.getLogger(__name__)

RUN_STATE = "run_state.json"
"""File of a checkpoint with what the trainer's own files do not hold."""

LINEAGE = "lineage"
"""Entry of it: a mark of every checkpoint that the run has written on its way, its own last."""

NEUTRAL = {
    "output_dir", "run_name", "project", "trackio_space_id", "resume", "report_to", "disable_tqdm", "sample_steps",
    "logging_steps", "logging_strategy", "logging_first_step", "log_level", "log_level_replica",
    "log_on_each_node", "include_num_input_tokens_seen", "save_steps", "save_strategy", "save_total_limit",
    "save_on_each_node", "hub_token", "hub_model_id", "push_to_hub", "hub_strategy",
    "hub_private_repo", "hub_revision", "hub_always_push", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "dataloader_persistent_workers", "ddp_timeout", "skip_memory_metrics",
    "rollout_memory_gb", "micro_batch_size", "overlap_rewards",
    "heldout_benchmark", "heldout_prompts", "heldout_steps", "heldout_measure",
    "heldout_num_images", "heldout_guidance_scale", "heldout_reward_options", "heldout_keep_images", "keep_best",
    "guard_window", "guard_max_kl", "guard_max_kl_slope", "guard_min_entropy_ratio", "guard_max_entropy_ratio",
    "guard_max_grad_growth", "guard_min_unique_images", "guard_max_heldout_drop", "guard_max_zero_variance",
    "guard_min_reward_spread", "guard_max_similarity", "guard_max_skipped", "guard_remedy", "guard_lr_factor",
    "guard_beta_factor", "guard_max_rollbacks", "ds3_gather_for_generation", "local_rank", "torch_empty_cache_steps",
    "use_cpu", "preset",
}  # fmt: skip
"""Keys that decide where and how often things are written, or how work is split: no number depends on them.

The preset is among them because its values are compared one by one, the guard's because the one thing that it does to
numbers, a rollback, is told and recorded by itself."""

_SCHEDULE = {"max_steps", "num_train_epochs"}
"""Keys that decide when to stop; they move numbers only through the learning-rate schedule."""
_RESTORED = {"weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
"""Keys that a checkpoint's optimizer brings with it."""
MATHS = "this changes the maths"
NO_RESULT = "no result depends on it"
NO_EFFECT = "no effect: the checkpoint's optimizer keeps the old value"


def checkpoint_to_resume(run: Path, wish: str) -> Path | None:
    """Find the checkpoint that a run is to continue from. Reads and hashes it, so ask in one process.

    Args:
        run: Output folder of the run.
        wish: ``auto`` for the newest whole checkpoint of the run, ``never``, or a checkpoint folder.

    Returns:
        A whole checkpoint, or None to begin at the beginning.

    Raises:
        ValueError: If a checkpoint is named that is missing or not whole, or if the run has checkpoints and none of
            them is whole.
    """
    if wish == "never":
        return None
    if wish != "auto":
        return _named(Path(wish))
    found, skipped = newest_whole(run)
    for folder, wrong in skipped.items():
        logger.warning("%s %s; passed over", folder, wrong)
    if found is None and skipped:
        listed = "; ".join(f"{folder.name} {wrong}" for folder, wrong in skipped.items())
        raise ValueError(
            f"no checkpoint of {run} is whole ({listed}); give another output_dir, or --resume never to start over"
        )
    if found is not None:
        logger.warning("continuing from %s; --resume never would start over", found)
    return found


def check_continuable(checkpoint: Path, num_processes: int, uses_deepspeed: bool) -> None:
    """Refuse a checkpoint that is whole, but not for this run to continue.

    Args:
        checkpoint: A checkpoint folder.
        num_processes: Those of this run.
        uses_deepspeed: Whether DeepSpeed will load it.

    Raises:
        ValueError: If it is not of this trainer, holds no optimizer, or one that is split otherwise.
    """
    path = checkpoint / RUN_STATE
    if not path.is_file():
        raise ValueError(f"{checkpoint} has no {RUN_STATE}, so it is no checkpoint of a run of this project")
    state = json.loads(path.read_text(encoding="utf-8"))
    anew = begin_anew(str(checkpoint), state["config"])
    if state["config"].get("save_only_model"):
        raise ValueError(f"{checkpoint} was saved with save_only_model, so no optimizer can continue; {anew}")
    if uses_deepspeed and state["world_size"] != num_processes:
        raise ValueError(
            f"{checkpoint} is of {state['world_size']} processes, and DeepSpeed continues with as many alone, "
            f"not with {num_processes}; start {state['world_size']}, or {anew}"
        )


def begin_anew(checkpoint: str, config: dict[str, Any]) -> str:
    """How a new run begins from a checkpoint's weights, with the reference that its run had.

    Args:
        checkpoint: The checkpoint folder.
        config: Configuration of its run.
    """
    if config.get("use_peft"):
        return f"begin a new run: stage merge {checkpoint} MERGED, then --model MERGED --resume never"
    reference = f" --ref_model {config.get('ref_model') or config.get('model')}" if config.get("beta") else ""
    return f"begin a new run with --model {checkpoint}{reference} --resume never"


def _named(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"resume={str(folder)!r} is no folder; give auto, never, or a checkpoint-N folder of a run")
    wrong = defect(folder)
    if wrong is not None:
        raise ValueError(f"resume={str(folder)!r} {wrong}; give another checkpoint, or auto for the newest whole one")
    return folder


def mark_of(checkpoint: Path) -> str | None:
    """What no other checkpoint has, also not one of the same step of another run; None if it cannot be read."""
    try:
        mark = json.loads((checkpoint / RUN_STATE).read_text(encoding="utf-8"))[LINEAGE][-1]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return mark if isinstance(mark, str) else None


def fingerprint(rows: Iterable[dict[str, Any]]) -> str:
    """Hash of prompts and metadata in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Compare what a run was told before and is told now.

    Args:
        before: Resolved configuration of the checkpoint, see :meth:`StageConfig.to_json`.
        now: That of the run which resumes.

    Returns:
        The changed keys as ``old -> new``, by what follows: ``MATHS``, ``NO_RESULT`` or ``NO_EFFECT``.
    """
    found: dict[str, dict[str, str]] = {MATHS: {}, NO_RESULT: {}, NO_EFFECT: {}}
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        constant = name in _SCHEDULE and before.get("lr_scheduler_type") == now.get("lr_scheduler_type") == "constant"
        follows = NO_EFFECT if name in _RESTORED else NO_RESULT if name in NEUTRAL or constant else MATHS
        found[follows][name] = f"{old!r} -> {new!r}"
    return found


def report_changes(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Log what a resumed run does differently."""
    for consequence, changed in changes(before, now).items():
        for name, change in changed.items():
            logger.warning("resuming %s with another %s: %s (%s)", folder, name, change, consequence)
