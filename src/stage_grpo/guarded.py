"""TRL's GRPO trainer under a guard: what the guard sees, what checkpoints keep of it, and the way back to one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor

from stage_grpo.guard import Guard
from stage_grpo.guard_record import newest_whole_until, rollback_to, set_aside
from stage_grpo.guard_rules import PASSIVE_RULES
from stage_grpo.heldout_record import best_test, read_records
from stage_grpo.resumable import ResumableTrainer
from stage_grpo.run_folder import RunFolder, write_atomically

GUARD_STATE = "guard_state.json"
"""File of a checkpoint with the guard's memory."""


class GuardedTrainer(ResumableTrainer):
    """GRPO that is watched; see :class:`~stage_grpo.guard.Guard`. A run that nothing is told of has the same numbers.

    Attributes:
        guard: The guard.
    """

    beta: float

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.guard = Guard(self)
        self.add_callback(self.guard)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take TRL's training step and show its loss to the guard."""
        loss = super().training_step(*args, **kwargs)
        self.guard.see_loss(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.guard.see_gradient(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, and what the guard adds to the row of a step."""
        if "loss" in logs:
            logs |= self.guard.metrics()
        super().log(logs, start_time)

    def _save_rest(self, folder: Path) -> None:
        super()._save_rest(folder)
        if self.accelerator.is_main_process:
            write_atomically(folder / GUARD_STATE, json.dumps(self.guard.state_dict()) + "\n")

    def _protected(self) -> set[Path]:
        """With rollbacks also the way back to the best held-out test."""
        best = best_test(read_records(self.args.output_dir)) if self.args.guard == "rollback" else None
        way = None if best is None else newest_whole_until(self.args.output_dir, best.step, self.lineage, hashes=False)
        return super()._protected() | ({way} if way is not None else set())

    def _restore_rest(self, folder: Path) -> None:
        super()._restore_rest(folder)
        # Main process: guard.jsonl was written by it, a checkpoint's own state by an earlier part of the run.
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            path = folder / GUARD_STATE
            state = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            found = [state, rollback_to(self.args.output_dir, folder)]
        broadcast_object_list(found)
        state, rollback = found
        guard = self.guard
        if state is not None:
            guard.load_state_dict(state)
        # A state of more rollbacks was written after this one, and holds what it made.
        if rollback is not None and rollback.rollbacks >= guard.rollbacks:
            self.scale_learning_rate(rollback.learning_rate_factor / guard.learning_rate_factor)
            self.beta *= rollback.beta_factor / guard.beta_factor
            guard.learning_rate_factor, guard.beta_factor = rollback.learning_rate_factor, rollback.beta_factor
            guard.rollbacks = rollback.rollbacks + 1
            guard.alarmed &= PASSIVE_RULES


def go_back(trainer: GuardedTrainer) -> str:
    """Prepare the run folder for the way back that the guard decided, and let go of the trainer's memory.

    Nothing is lost: rows of ``metrics.jsonl`` are marked as abandoned, and newer checkpoints move to ``rolled_back/``.

    Args:
        trainer: The trainer, whose training ended with a rollback; not to be used after.

    Returns:
        The checkpoint to continue from.
    """
    record = trainer.guard.rollback
    assert record is not None and record.checkpoint is not None, "the guard asked for no rollback"
    run, step = Path(trainer.args.output_dir), int(record.checkpoint.removeprefix("checkpoint-"))
    if trainer.accelerator.is_main_process:
        set_aside(run, step, record.rollbacks + 1, clear=trainer.args.save_total_limit is not None)
        RunFolder(run).abandon_metrics(step, record.rollbacks + 1)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    return str(run / record.checkpoint)
