"""Held-out evaluation during training: the same prompts and random streams every k steps, and the best policy kept.

Every step goes the way of ``stage generate`` and ``stage evaluate``, so that the last score is the one that they would
give for the saved policy. Nothing of it reaches the training: random states, metrics and gradients stay as they were.

transformers' own best checkpoint (``metric_for_best_model``) is left alone. It follows what ``Trainer.evaluate``
returns, the training reward on ``eval_prompts``; it keeps a whole checkpoint, optimizer included; and it has one only
where saving and evaluating fall on the same step.
"""

from __future__ import annotations

import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import Trainer, TrainerCallback

from stage_grpo.evaluation.evaluate import evaluate
from stage_grpo.gathering import with_whole_weights
from stage_grpo.generation.generate import MAX_BATCH_SIZE, generate
from stage_grpo.graceful_stop import GracefulStop
from stage_grpo.guard_signals import signals_of
from stage_grpo.heldout_plan import SEED, HeldoutPlan, warn_if_trained_on
from stage_grpo.heldout_record import BEST, IMAGES, HeldoutFolder, HeldoutRecord
from stage_grpo.rollout import bytes_per_row, memory_budget
from stage_grpo.run_checkpoints import PARTIAL

if TYPE_CHECKING:
    from stage_grpo.trainer import StageTrainer

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_FAILURES = (ValueError, OSError, RuntimeError)
"""What may go wrong: a disk, a server, a GPU's memory. Anything else is a mistake in the code and ends the run."""
_PROMPT_TOKENS = 128
"""Length that prompts are taken to have where memory is turned into a number of images."""


class HeldoutEvaluation(TrainerCallback):
    """Scores the policy at step 0, every k steps and at the end, and keeps the best one in ``best/``.

    A step is scored after its checkpoint is written, just before the next one begins: a kill meanwhile costs the
    evaluation alone, and a signal need not wait for one. A resumed run scores what it finds not to be scored.

    Args:
        trainer: The trainer; its averaged weights are scored and kept, if there are any.
        plan: What is scored.
        steps: Optimizer steps between two evaluations.
        processor: Saved beside the best policy; None keeps no policy.
        keep_images: Keep the images of all steps, not only of the first, the best and the last.
        stop: What ends the run at a signal; such an end is not scored.
        has_begun: Whether this process has trained before, with another trainer: then no failure ends the run.
    """

    def __init__(
        self,
        trainer: StageTrainer,
        plan: HeldoutPlan,
        steps: int,
        processor: Any = None,
        keep_images: bool = False,
        stop: GracefulStop | None = None,
        has_begun: bool = False,
    ):
        self.trainer = trainer
        self.plan = plan
        self.steps = steps
        self.processor = processor
        self.keep_images = keep_images
        self.stop = stop
        self.folder = HeldoutFolder(str(trainer.args.output_dir), plan.fingerprint)
        self._done: set[int] = set()
        self._tried = has_begun

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the scores of earlier parts of the run."""

        def begin() -> dict[int, HeldoutRecord]:
            warn_if_trained_on(self.plan, self.trainer.args.rewards or [])
            self.folder.begin(state.global_step if self.trainer.run_folder.is_resumed else None)
            return {record.step: record for record in self.folder.records}

        known = _in_main_process(self.trainer, begin)
        self._done = set(known)
        guard = self.trainer.guard
        earlier = [record for step, record in known.items() if step < state.global_step]
        guard.history.take_up_tests(signals_of(record.step, record.metrics()) for record in earlier)
        if state.global_step in known:  # the rules see it with the next step, as they would have
            guard.on_log(args, state, control, known[state.global_step].metrics())

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score the step that ended, if its turn has come."""
        if state.global_step % self.steps == 0:
            self._score_once(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score the end of the run, while its trackers still listen."""
        if self.trainer.guard.rollback is not None:
            return  # these steps are taken again
        interrupted = self.stop is not None and self.stop.stopped_at is not None
        ended = state.global_step >= state.max_steps or (control.should_training_stop and not interrupted)
        if ended:
            self._score_once(state.global_step)
        if state.global_step >= state.max_steps:
            self.trainer.guard.see_end(state.global_step, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score the end of a run that resumed after its last step, and so had no epoch."""
        self.on_epoch_end(args, state, control)

    def _score_once(self, step: int) -> None:
        """Score a step unless it is scored. The first failure ends the run, a later one leaves the step out."""
        if step in self._done:
            return
        first, self._tried = not self._tried, True
        self._done.add(step)
        try:
            with self.trainer.averaged(), untouched_random_state():
                record = self._take(score_policy(self.trainer, self.plan, self.folder.step_folder(step), step))
        except _FAILURES as error:
            if first:
                raise
            if self.trainer.accelerator.is_main_process:
                logger.warning("the held-out evaluation of step %d failed and is left out: %s", step, error)
            return
        # Past TRL's own log(), which would mix in the metrics of the training step and empty them.
        Trainer.log(self.trainer, record.metrics())

    def _take(self, record: HeldoutRecord) -> HeldoutRecord:
        """Keep the policy if it is the best, then the record: a kill in between costs a repetition."""
        record = _in_main_process(self.trainer, lambda: self.folder.compared(record))
        better = _in_main_process(self.trainer, lambda: self.folder.is_best(record))
        if better and self.processor is not None:
            self._keep(record)
        _in_main_process(self.trainer, lambda: self.folder.add(record, self.keep_images))
        return record

    def _keep(self, record: HeldoutRecord) -> None:
        partial = Path(str(self.trainer.args.output_dir)) / PARTIAL / BEST
        _in_main_process(self.trainer, lambda: shutil.rmtree(partial, ignore_errors=True))
        _agree(_failure(lambda: self.trainer.save_model(str(partial), _internal_call=True)))

        def publish() -> None:
            self.processor.save_pretrained(partial)
            self.folder.keep_best(record, partial)

        _in_main_process(self.trainer, publish)


def score_policy(trainer: StageTrainer, plan: HeldoutPlan, folder: Path, step: int = 0) -> HeldoutRecord:
    """Generate the plan's images with the present weights and score them. All processes call it together.

    Args:
        trainer: The trainer.
        plan: What to generate, and how it is scored.
        folder: Receives ``images/``, ``scores.json`` and the records of the images. What it holds is replaced, since
            it may be another policy's.
        step: Optimizer steps so far.

    Returns:
        The score, in every process.

    Raises:
        ValueError: If images cannot be made, written or scored in any process; then in all.
    """
    start = time.perf_counter()
    images = folder / IMAGES
    _in_main_process(trainer, lambda: shutil.rmtree(folder, ignore_errors=True))

    def draw(policy: Any) -> str | None:
        batch_size = _batch_size(trainer, policy, plan)
        return _failure(lambda: _draw_share(trainer, policy, plan, images, batch_size))

    _agree(with_whole_weights(trainer, draw))

    def score() -> HeldoutRecord:
        scores = evaluate(
            plan.benchmark,
            images,
            prompts=plan.prompts,
            num_images=plan.num_images,
            measures=plan.measures,
            reward_options=plan.reward_options,
            diversity_space="codes",
        )
        scores.save(folder / "scores.json")
        return HeldoutRecord.of(scores, plan, step, time.perf_counter() - start)

    return _in_main_process(trainer, score)


def _batch_size(trainer: StageTrainer, policy: Any, plan: HeldoutPlan) -> int:
    """Images that are sampled at a time: as many as fit in every process, in equal shares."""
    row_bytes = bytes_per_row(policy, _PROMPT_TOKENS, plan.sampling.guidance_scale != 1)
    gigabytes = trainer.args.rollout_memory_gb
    budget = memory_budget(policy.device) if gigabytes is None else int(gigabytes * 1e9)
    fitting: list[int] = gather_object([max(1, min(MAX_BATCH_SIZE, budget // row_bytes))])
    num_images, num_processes = len(plan.rows) * plan.num_images, trainer.accelerator.num_processes
    rounds = math.ceil(num_images / (num_processes * min(fitting)))
    return math.ceil(num_images / (num_processes * rounds))


def _draw_share(trainer: StageTrainer, policy: Any, plan: HeldoutPlan, images: Path, batch_size: int) -> None:
    """Generate this process's share of the images, as training samples them."""
    with trainer.accelerator.autocast():
        generate(
            policy,
            trainer.processing_class,
            plan.rows,
            images,
            plan.sampling,
            num_images=plan.num_images,
            seed=SEED,
            batch_size=batch_size,
            prompt_template=plan.prompt_template,
            layout=plan.benchmark.layout,
            share=(trainer.accelerator.process_index, trainer.accelerator.num_processes),
        )


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Give back the random states of Python, NumPy and torch (CPU and this process's GPU) as they were found."""
    python, numpy = random.getstate(), np.random.get_state()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _failure(work: Callable[[], object]) -> str | None:
    try:
        work()
    except _FAILURES as error:
        logger.debug("held-out evaluation", exc_info=True)
        return str(error) or type(error).__name__
    return None


def _agree(failure: str | None) -> None:
    """Fail in every process if one failed, so that none waits for it."""
    failures = [found for found in gather_object([failure]) if found is not None]
    if failures:
        raise ValueError(failures[0])


def _in_main_process(trainer: StageTrainer, work: Callable[[], Result]) -> Result:
    """Do something in the main process; its result comes, or its failure is raised, in every process."""
    results: list[Any] = [None]
    failure = None
    if trainer.accelerator.is_main_process:
        failure = _failure(lambda: results.__setitem__(0, work()))
    _agree(failure)
    broadcast_object_list(results)
    return results[0]
