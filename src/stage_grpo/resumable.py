"""TRL's GRPO trainer with checkpoints that are whole or absent, and a resume that continues to the bit.

transformers and TRL save and restore weights, optimizer, scheduler, trainer state and random states. Added here: the
atomic writing of all that, TRL's place inside a buffered rollout, the sampler's place beyond the first epoch, and the
averaged weights.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from trl import GRPOTrainer

from stage_grpo.averaging import AverageCallback
from stage_grpo.checkpoints.errors import shorten
from stage_grpo.resuming import (
    LINEAGE,
    RUN_STATE,
    check_continuable,
    checkpoint_to_resume,
    fingerprint,
    report_changes,
)
from stage_grpo.rewards.combination import RewardSum
from stage_grpo.run_checkpoints import PARTIAL, not_written, publish, rotate, seal
from stage_grpo.run_folder import RunFolder, write_atomically
from stage_grpo.shards import LocalShards

AVERAGE, REFERENCE = "average", "reference"
"""Folders of a checkpoint with the averaged weights, and with a synced reference policy."""

_PLACES = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations", "processes"
)  # fmt: skip
"""What a rollout is cut by; beside the configuration's keys the number of processes."""


class ResumableTrainer(GRPOTrainer):
    """GRPO whose checkpoints are atomic and complete; see :class:`~stage_grpo.trainer.StageTrainer`.

    Attributes:
        lineage: Marks of the checkpoints on the way of this training, in the main process; a run folder may hold
            others, of an earlier run or of steps that a resume went back behind.
        processor: What checkpoints keep beside the weights, so that a model can be loaded from them; None: nothing.
    """

    args: Any  # a StageConfig: TRL's own annotations would hide its fields
    model: Any
    optimizer: Any
    lr_scheduler: Any
    reward_sum: RewardSum
    run_folder: RunFolder
    _saving = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.lineage: list[str] = []
        self.processor: Any = None
        self.averaging = None if self.args.ema_decay is None else AverageCallback(self.args.ema_decay)
        if self.averaging is not None:
            self.add_callback(self.averaging)

    # ---- writing ----------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._saving else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place, and move it there when it is whole.

        Raises:
            OSError: If it cannot be written; the checkpoints of earlier steps are untouched.
        """
        run = Path(super()._get_output_dir(trial))
        partial = run / PARTIAL / f"checkpoint-{self.state.global_step}"
        self._saving = True
        try:
            self._clear(partial.parent)
            super()._save_checkpoint(model, trial)
            self._save_rest(partial)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self._correct_best(run, partial)
                seal(partial)
                publish(partial, run / partial.name)
                rotate(run, self.args.save_total_limit, self._protected())
                shutil.rmtree(partial.parent)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial.parent, ignore_errors=True)
            raise OSError(not_written(run, partial.name, error)) from error
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()

    def _clear(self, folder: Path) -> None:
        """Remove what a killed process left of a checkpoint."""
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _save_rest(self, folder: Path) -> None:
        """Add what transformers and TRL do not save: one file a run, and the files of each process."""
        rank = self.accelerator.process_index
        if self._inside_buffer:
            torch.save(self._buffered_inputs, folder / f"rollout_buffer_{rank}.pt")
        if self.averaging is not None and self.averaging.average is not None:
            self.averaging.average.save(folder / AVERAGE)
        if self.args.sync_ref_model:
            reference = self._reference_shards
            reference.save(folder / REFERENCE, "reference", reference.copies())
        if self.accelerator.is_main_process:
            self.lineage = [*self.lineage, uuid.uuid4().hex]
            state = {
                LINEAGE: self.lineage,
                "micro_step": self._step,
                "world_size": self.accelerator.num_processes,
                "train_data": self._data_fingerprint,
                "config": self.args.to_json(),
                "reward_sum": self.reward_sum.state_dict(),
            }
            write_atomically(folder / RUN_STATE, json.dumps(state, indent=2) + "\n")
            if self.processor is not None:
                self.processor.save_pretrained(folder)

    def _protected(self) -> set[Path]:
        """Checkpoints that no limit may delete."""
        best = self.state.best_model_checkpoint
        return set() if best is None else {Path(best)}

    def _correct_best(self, run: Path, partial: Path) -> None:
        """Record the best checkpoint under its final name, where transformers wrote the one of its partial folder."""
        best = run / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best.name == partial.name or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))

    # ---- reading ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does.

        Args:
            resume_from_checkpoint: A checkpoint folder; True for the newest whole one of the output folder, if there
                is any; None to begin at the beginning.
            *args: As in ``transformers.Trainer``.
            **kwargs: As in ``transformers.Trainer``.

        Raises:
            ValueError: If the checkpoint is missing, torn or damaged, or nothing that this run could continue.
        """
        wish = {True: "auto", False: "never", None: "never"}.get(resume_from_checkpoint, resume_from_checkpoint)
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = checkpoint_to_resume(Path(self.args.output_dir), str(wish))
                if found[0] is not None:
                    check_continuable(found[0], self.accelerator.num_processes, self.is_deepspeed_enabled)
            except ValueError as error:
                found[1] = str(error)  # raised in every process, so that none waits for the others
        broadcast_object_list(found)
        if found[1] is not None:
            raise ValueError(found[1])
        return super().train(found[0] and str(found[0]), *args, **kwargs)

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        epochs, steps = super()._init_training_state(*args)
        # TRL's sampler draws one permutation an epoch from its own generator; transformers skips within the current
        # epoch alone, so the earlier ones are drawn here.
        for _ in range(epochs):
            next(iter(self._train_sampler), None)
        return epochs, steps

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler: Any = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._step, self._buffered_inputs, self.lineage = 0, None, []
        self.run_folder.is_resumed = resume_from_checkpoint is not None
        if resume_from_checkpoint is not None:
            self._restore_rest(Path(resume_from_checkpoint))
        return prepared

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse weights that do not fit, of which transformers only warns.

        Raises:
            ValueError: If a weight is missing or unknown; the second name of a tied weight is not stored.
        """
        missing = [name for name in load_result.missing_keys if name not in self.model.all_tied_weights_keys]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint's weights are another model's: missing {shorten(missing) or 'none'}, unknown "
                f"{shorten(load_result.unexpected_keys) or 'none'}; resume with the model the run began with"
            )

    def _restore_rest(self, folder: Path) -> None:
        """Read what :meth:`_save_rest` wrote.

        Raises:
            ValueError: If a rollout is under way that this run cannot finish, as with another number of processes.
        """
        state = json.loads((folder / RUN_STATE).read_text(encoding="utf-8"))
        self.lineage = state[LINEAGE]
        self._restore_place(folder, state)
        self.reward_sum.load_state_dict(state.get("reward_sum", {}))
        if self.accelerator.is_main_process:
            before = {**state["config"], "processes": state["world_size"], "train_data": state["train_data"]}
            processes = {"processes": self.accelerator.num_processes, "train_data": self._data_fingerprint}
            report_changes(folder, before, {**self.args.to_json(), **processes})
        if began_with := state["config"].get("learning_rate"):
            self.scale_learning_rate(self.args.learning_rate / began_with)
        if self.averaging is not None and (folder / AVERAGE).is_dir():
            self.averaging.resume_from = folder / AVERAGE  # read when the average is made, as training begins
        if self.args.sync_ref_model and (folder / REFERENCE).is_dir():
            reference = self._reference_shards
            reference.write(reference.load(folder / REFERENCE, "reference")[0])

    def _restore_place(self, folder: Path, state: dict[str, Any]) -> None:
        """Find the place within a rollout; one that counts otherwise than the checkpoint begins with a new one."""
        before = {**state["config"], "processes": state["world_size"]}
        now = {**self.args.to_json(), "processes": self.accelerator.num_processes}
        changed = [f"{name}={before.get(name)}" for name in _PLACES if before.get(name) != now[name]]
        if changed:
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
        else:
            self._step = state["micro_step"]
        if state["micro_step"] % (before["steps_per_generation"] * before["num_iterations"]) == 0:
            return
        if changed:
            raise ValueError(
                f"{folder} was saved with a rollout under way: continue it with {', '.join(changed)} as before, or "
                "take a checkpoint of a step where no rollout is under way"
            )
        buffer = folder / f"rollout_buffer_{self.accelerator.process_index}.pt"
        if not buffer.is_file():
            raise ValueError(f"{folder} has no {buffer.name}; take a checkpoint of another step")
        self._buffered_inputs = torch.load(buffer, map_location=self.accelerator.device, weights_only=True)

    def scale_learning_rate(self, factor: float) -> None:
        """Scale what optimizer and schedule were restored to; later checkpoints then hold the scaled values."""
        if factor == 1:
            return
        for group in self.optimizer.param_groups:
            for name in ("lr", "initial_lr"):
                if name in group:
                    group[name] *= factor
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # DeepSpeed's is wrapped
        for name in ("base_lrs", "_last_lr"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, [value * factor for value in getattr(scheduler, name)])

    def _run_epoch(self, **kwargs: Any) -> None:
        # A checkpoint of the last step has nothing left to train; transformers would take one more step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    # ---- the rest ---------------------------------------------------------------------------------------------

    @property
    def _inside_buffer(self) -> bool:
        """Whether the next micro-batch comes from a rollout that was sampled already."""
        return self._step % (self.args.steps_per_generation * self.num_iterations) != 0

    @property
    def _reference_shards(self) -> LocalShards:
        reference: Any = self.accelerator.unwrap_model(self.ref_model)
        return LocalShards(reference)

    @cached_property
    def _data_fingerprint(self) -> str:
        rows: Any = self.train_dataset
        return fingerprint(rows)

    def averaged(self) -> AbstractContextManager[Any]:
        """Inside this context the policy has the averaged weights, if they are kept."""
        return nullcontext() if self.averaging is None else self.averaging.swapped()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as TRL does, with the averaged weights if they are kept."""
        with self.averaged():
            return super().evaluate(*args, **kwargs)
