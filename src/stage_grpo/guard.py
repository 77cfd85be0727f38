"""The guard of a run: it watches the signals of each step, keeps broken steps out of the weights, warns and acts.

What it watches is logged in any case, so that nothing is computed twice; what it decides, it decides in the main
process, and all processes do the same. A rollback ends the training with a note of where to go back to; the one who
started it (``stage_grpo.training``) starts it again there, which is the way that a resumed run goes.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainerCallback

from stage_grpo.graceful_stop import GracefulStop
from stage_grpo.guard_finite import FiniteCheck
from stage_grpo.guard_record import GuardRecord, append_guard, keep_guard, newest_whole_until, way_back
from stage_grpo.guard_rules import HELDOUT_END, PASSIVE_RULES, Alarm, GuardThresholds, adapted_beta, check, kl_slope
from stage_grpo.guard_signals import HELDOUT, METRICS, FreshMetrics, History, Signals, signals_of
from stage_grpo.run_folder import BEST

if TYPE_CHECKING:
    from stage_grpo.guarded import GuardedTrainer

logger = logging.getLogger(__name__)

NOT_FINITE = "not_finite"
"""What a run without finite losses and gradients is told as, beside the rules."""
_KEPT = ("skipped_steps", "skipped_in_a_row", "rollbacks", "learning_rate_factor", "beta_factor")


class Guard(TrainerCallback):
    """Watches one training. Keys and rules: docs/guard.md.

    Args:
        trainer: The trainer.

    Attributes:
        stop: What ends the run at a signal, if anything does; it is told of an end that the guard decided. Whoever
            sets it goes back after the training, if ``rollback`` says so.
        stopped_by: Why the guard stopped the run; None if it did not.
        rollback: Where the run is to go back to; None if it is not.
        skipped_steps: Optimizer steps of the run that were skipped.
        skipped_in_a_row: How many of them came last.
        rollbacks: Rollbacks of the run so far.
        learning_rate_factor: What they made of the learning rate.
        beta_factor: What they made of beta.
    """

    def __init__(self, trainer: GuardedTrainer):
        self.trainer = trainer
        self.args = trainer.args
        self.run = Path(trainer.args.output_dir)
        self.thresholds = GuardThresholds.of(trainer.args)
        self.stop: GracefulStop | None = None
        self.stopped_by: str | None = None
        self.rollback: GuardRecord | None = None
        self._forget()

    def _forget(self) -> None:
        self.history = History(self.args.guard_window)
        self.alarmed: set[str] = set()
        self.skipped_steps = self.skipped_in_a_row = self.rollbacks = 0
        self.learning_rate_factor = self.beta_factor = 1.0
        self.trainer.beta = self.args.beta
        self._beta_used = self.args.beta
        self._fresh = FreshMetrics(self.trainer._metrics["train"])
        self._heldout: dict[str, Any] = {}
        self._finite = FiniteCheck(self.trainer.accelerator)

    @property
    def is_on(self) -> bool:
        """Whether anything is guarded."""
        return self.args.guard != "off"

    # ---- what a step showed -----------------------------------------------------------------------------------

    def see_loss(self, loss: Tensor) -> None:
        """Take in the loss of one micro-batch on this process, without waiting for it."""
        if self.is_on:
            self._finite.add_loss(loss)

    def see_gradient(self, norm: Any) -> None:
        """Take in the gradient norm of a step, the same in all processes."""
        if self.is_on:
            self._finite.set_gradient(norm)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Take in a held-out test; the rules see it with the next step, or at the end."""
        self._heldout |= {name: value for name, value in (logs or {}).items() if name in HELDOUT}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep a step without a finite loss and gradient out of weights and optimizer state."""
        if not self.is_on:
            return
        if not self._finite.close():
            self.skipped_in_a_row = 0
            return
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        # An optimizer passes over what has no gradient: weights, moments and weight decay stay as they were. DeepSpeed
        # and a loss scaler took or skipped their step by now, on the same ground.
        if self.trainer.accelerator.scaler is None:
            self.trainer.optimizer.zero_grad(set_to_none=True)
        limit = self.args.guard_max_skipped
        seen = f"loss {self._finite.loss}, gradient norm {self._finite.grad_norm}"
        message = f"{seen}: skipped, {self.skipped_in_a_row} of {limit} in a row"
        self._tell(state.global_step + 1, Alarm(NOT_FINITE, math.nan, limit, True, message), "skip")

    def metrics(self) -> dict[str, float]:
        """What is logged beside the signals."""
        logged: dict[str, float] = {}
        if self.is_on:
            logged |= {"guard/skipped_steps": float(self.skipped_steps), "guard/alarms": float(len(self.alarmed))}
            slope = kl_slope(self.history)
            logged |= {} if slope is None else {"guard/kl_slope": slope}
        if self.args.kl_target is not None or self.beta_factor != 1:
            logged["beta"] = self._beta_used
        return logged

    # ---- what follows from it ---------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin anew, or drop what was told of steps that are taken again.

        Raises:
            ValueError: If a rollback is asked for and nobody would start the training again.
        """
        if self.args.guard == "rollback" and self.stop is None:
            raise ValueError(
                "guard='rollback' ends a training, and who started it goes on from a checkpoint: start it with "
                "stage_grpo.training.train(config) instead of trainer.train(), or set guard=stop"
            )
        is_new = not self.trainer.run_folder.is_resumed
        if is_new:
            self._forget()
        self.stopped_by, self.rollback = None, None
        if state.is_world_process_zero:
            keep_guard(self.run, None if is_new else state.global_step, self.rollbacks)
        if is_new and self.args.guard == "rollback":
            # A run may fall apart before its first checkpoint: the way back to its beginning is always there.
            self.trainer._save_checkpoint(self.trainer.model, trial=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the rules, act as configured, adapt beta.

        Raises:
            ValueError: If too many steps in a row had no finite loss and gradient, and there is nowhere to go back to.
        """
        self._beta_used = self.trainer.beta
        if not self.is_on and self.args.kl_target is None:
            return
        signals = self._signals(state.global_step)
        outcome: list[Any] = [None, self._next_beta(signals.kl)]
        interrupted = self.stop is not None and self.stop.stopped_at is not None
        if self.is_on and not interrupted and self.trainer.accelerator.is_main_process:
            outcome[0] = self._judge(state.global_step)
        # What every process can see by itself says whether there is anything that must be the same in all.
        if self._gives_up or self.args.guard in ("stop", "rollback") or self.args.kl_target is not None:
            broadcast_object_list(outcome)
        record, self.trainer.beta = outcome
        if record is not None:
            self._act(record, control)

    def _signals(self, step: int) -> Signals:
        metrics = {name: self._fresh.mean(name) for name in METRICS.values()}
        signals = signals_of(step, {**metrics, **self._heldout, "grad_norm": self._finite.grad_norm})
        self._heldout = {}
        self.history.add(signals)
        return signals

    def _next_beta(self, kl: float | None) -> float:
        if self.args.kl_target is None or kl is None:
            return self.trainer.beta
        return adapted_beta(self.trainer.beta, kl, self.args.kl_target)

    @property
    def _gives_up(self) -> bool:
        return self.is_on and self.skipped_in_a_row >= self.args.guard_max_skipped

    def _judge(self, step: int) -> GuardRecord | None:
        """Tell of what began with this step, in the main process.

        Returns:
            What is done about it: ``stop``, ``rollback`` or ``fail``; None to go on.
        """
        alarms = check(self.history, self.thresholds)
        begun = [alarm for alarm in alarms if alarm.rule not in self.alarmed]
        self.alarmed = {alarm.rule for alarm in alarms}
        causes = [alarm for alarm in begun if alarm.acts]
        if self._gives_up:
            message = f"{self.skipped_in_a_row} steps in a row had no finite loss and gradient, and were skipped"
            causes.insert(0, Alarm(NOT_FINITE, math.nan, self.args.guard_max_skipped, True, message))
        action, checkpoint, note = self._decide(step, causes[0].rule) if causes else (None, None, "")
        for alarm in begun:
            if action is None or alarm is not causes[0]:
                self._tell(step, alarm, "warn")
        return None if action is None else self._tell(step, causes[0], action, checkpoint, note)

    def _decide(self, step: int, rule: str) -> tuple[str | None, Path | None, str]:
        """What to do, the checkpoint to name, and what to add to the message."""
        note = ""
        if self.args.guard == "rollback":
            best = self.history.heldout_best_step
            checkpoint, note = way_back(self.args, step, rule, best, self.rollbacks, self.trainer.lineage)
            if checkpoint is not None:
                return "rollback", checkpoint, note
        if self._gives_up:
            return "fail", newest_whole_until(self.run, step, self.trainer.lineage), note
        has_ended = step >= self.trainer.state.max_steps
        return (None if self.args.guard == "warn" or has_ended else "stop"), None, note

    def _tell(
        self, step: int, alarm: Alarm, action: str, checkpoint: Path | None = None, note: str = ""
    ) -> GuardRecord:
        """Log a line and add it to ``guard.jsonl``, in the main process."""
        is_rollback, remedy = action == "rollback", self.args.guard_remedy
        record = GuardRecord(
            step,
            alarm.rule,
            action,
            None if math.isnan(alarm.value) else alarm.value,
            alarm.threshold,
            alarm.message + note,
            self.rollbacks,
            None if checkpoint is None else checkpoint.name,
            self.learning_rate_factor
            * (self.args.guard_lr_factor if is_rollback and remedy == "learning_rate" else 1.0),
            self.beta_factor * (self.args.guard_beta_factor if is_rollback and remedy == "beta" else 1.0),
        )
        if self.trainer.accelerator.is_main_process:
            logger.warning("guard, step %d, %s: %s", step, action, record.message)
            append_guard(self.run, record)
        return record

    def _act(self, record: GuardRecord, control: Any) -> None:
        if record.action == "fail":
            known = "there is no whole checkpoint"
            if record.checkpoint is not None:
                known = f"the last whole checkpoint is {self.run / record.checkpoint}"
            other = "" if self.args.guard == "rollback" else ", or let guard=rollback lower it"
            raise ValueError(
                f"step {record.step}: {record.message}; {known}; find the cause in metrics.jsonl, then begin again "
                f"with a smaller learning_rate{other}"
            )
        control.should_training_stop = True
        control.should_save = record.action == "stop"
        if record.action == "stop":
            self.stopped_by = f"guard: {record.message}"
        else:
            control.should_evaluate = False
            self.rollback = record
        if self.stop is not None:
            self.stop.stopped_at = record.step

    def see_end(self, step: int, control: Any) -> None:
        """Judge the held-out test of the last step: it may take the run back, and there is nothing left to stop."""
        test, self._heldout = signals_of(step, self._heldout), {}
        if not self.is_on or not self.history.add_test(test):
            return
        outcome: list[Any] = [None]
        alarm = HELDOUT_END.check(self.history, self.thresholds)
        if alarm is not None and self.trainer.accelerator.is_main_process:
            action, checkpoint, note = self._decide(step, alarm.rule)
            if action is None and (self.run / BEST).is_dir():
                note += f"; {self.run / BEST} holds the best policy"
            record = self._tell(step, alarm, action or "warn", checkpoint, note)
            outcome = [None if action is None else record]
        if self.args.guard == "rollback":
            broadcast_object_list(outcome)
        if outcome[0] is not None:
            self._act(outcome[0], control)

    # ---- keeping it -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON data, exact."""
        kept = {name: getattr(self, name) for name in _KEPT}
        return {
            **kept,
            "mode": self.args.guard,
            "alarmed": sorted(self.alarmed),
            "history": self.history.state_dict(),
            "beta": self.trainer.beta,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        for name in _KEPT:
            setattr(self, name, state[name])
        told = set(state["alarmed"])  # in another mode it is told anew, to be acted on
        self.alarmed = told if state["mode"] == self.args.guard else told & PASSIVE_RULES
        self.history.load_state_dict(state["history"])
        # A beta that nothing moves is the configuration's, also where that has changed since.
        is_adapted = self.args.kl_target is not None
        self.trainer.beta = state["beta"] if is_adapted else self.args.beta * self.beta_factor
