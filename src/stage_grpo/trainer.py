"""STAGE on TRL's GRPO trainer.

What is *unchanged* from :class:`trl.GRPOTrainer`: sampling order, buffering over several iterations, group advantages,
every loss type and ratio, clipping, entropy masks, PEFT, reference sync, optimisation, evaluation, checkpoints. What
is added: images instead of text (the rollout), the entropy reward, a weight per token on advantages and on the KL,
images and timings in the logs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from stage_grpo import objective, trl_seams
from stage_grpo.config import StageConfig
from stage_grpo.devices import clock
from stage_grpo.entropy import entropy_loss, entropy_reward
from stage_grpo.gathering import ShardedTrainer, image_policy
from stage_grpo.guarded import GuardedTrainer
from stage_grpo.micro_batched import MicroBatchedTrainer
from stage_grpo.onednn_linear import onednn_pays, use_onednn
from stage_grpo.policy.loading import load_tokenizer
from stage_grpo.policy.scoring_head import add_scoring_head
from stage_grpo.rewards.base import Reward, RewardFunction
from stage_grpo.rewards.combination import RewardSum
from stage_grpo.rewards.side_by_side import RewardThreads
from stage_grpo.run_folder import RunFolder, RunFolderCallback, StepProgress, peak_memory_mb
from stage_grpo.token_weights import token_weights, unique_share
from stage_grpo.weighting.options import chosen_weighting

# The project pins what it relies on in tests/test_trl_seams.py, so TRL's reminder that it may change is noise.
warnings.filterwarnings("ignore", message="You are using 'rollout_func'")


class StageTrainer(ShardedTrainer, MicroBatchedTrainer, GuardedTrainer):
    """GRPO for autoregressive image models, with STAGE's entropy reward and token weights.

    Args:
        model: An image policy, e.g. ``JanusPolicy.from_pretrained(...)``.
        rewards: One reward or several: :class:`~stage_grpo.rewards.base.Reward` objects or plain functions
            ``f(images, prompts, metadata)``.
        args: The configuration.
        train_dataset: Columns ``prompt`` and optionally ``metadata`` (JSON text), see ``stage_grpo.data``.
        eval_dataset: The same, for evaluation during training.
        processing_class: Tokenizer; by default the checkpoint's own.
        callbacks: Further callbacks.
        optimizers: As in ``transformers.Trainer``.
        peft_config: Train adapters instead of the model; the reference is then the model without them. By default
            those of ``use_peft``, ``lora_r``, ``lora_alpha`` and ``lora_dropout``.

    Raises:
        ValueError: If the policy does not fit the configuration, cannot be loaded again as reference, or another one
            is named as reference beside adapters.
    """

    _tag_names = ("stage-grpo", "grpo")

    def __init__(
        self,
        model: Any,
        rewards: Reward | RewardFunction | Sequence[Reward | RewardFunction],
        args: StageConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        policy = image_policy(model)
        trl_seams.check_policy(policy, args)
        peft_config = trl_seams.chosen_adapters(model, args, peft_config)
        rewards = list(rewards) if isinstance(rewards, Sequence) else [rewards]
        ahead = args.device.type != "cpu" if args.overlap_rewards is None else args.overlap_rewards
        self.reward_threads = RewardThreads(rewards, ahead)
        functions: list[Any] = [*self.reward_threads.functions]
        complete = trl_seams.complete_args(args, policy, [function.__name__ for function in functions])
        if args.entropy_reward_weight:
            functions.append(trl_seams.entropy_placeholder)
        roll_out: Any = trl_seams.sample_images
        self._rollouts = (True, 0, 0)  # training or not, step, rollouts so far
        self._generation_seconds = self._update_seconds = 0.0
        self._scored: tuple[Tensor, Tensor] | None = None
        self._total_rewards: Tensor = torch.empty(0)
        with trl_seams.reference_of(policy, args.ref_model, args.sync_ref_model):
            super().__init__(
                model=model,
                reward_funcs=functions,
                args=complete,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class or load_tokenizer(policy),
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
                rollout_func=roll_out,
            )
        self.reward_sum = RewardSum(self.reward_weights[: len(rewards)], args.reward_aggregation)
        self._weighting = chosen_weighting(args)
        self._own = slice(len(rewards))  # the entropy reward's column comes last
        self._prepare_scoring()
        self.run_folder = RunFolder(str(args.output_dir))
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(RunFolderCallback(self.run_folder, args, self.callback_handler))
        if not args.disable_tqdm:
            self.add_callback(StepProgress())

    def _prepare_scoring(self) -> None:
        """Score in float32, with entropies, the guided distribution where asked; the reference likewise."""
        guidance = self.args.guidance_scale if self.args.guidance_in_scoring else None
        for model in (self.model, self.ref_model):
            if model is None:
                continue
            policy: Any = image_policy(self.accelerator.unwrap_model(model))
            policy.scoring_guidance = None if guidance == 1 else guidance
            policy.shares_prompts = self.args.share_prompts and self.can_share_prompts
            if self.accelerator.device.type == "cpu" and onednn_pays():
                use_onednn(policy)
            add_scoring_head(policy, self.temperature, self.accelerator.device)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of a phase to the metric ``seconds/<phase>``."""
        start = clock(self.accelerator.device)
        yield
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][f"seconds/{phase}"].append(clock(self.accelerator.device) - start)

    def rollout_keys(self, num_images: int) -> list[tuple[int, ...]]:
        """Name the random stream of each image this process samples next.

        Streams depend on the seed, the step and the image's place in the whole batch, not on how the batch is split
        over processes. Evaluations all use the same streams, so that they compare.
        """
        training = self.model.training
        step = self.state.global_step if training else 0
        if self._rollouts[:2] != (training, step):
            self._rollouts = (training, step, 0)
        count = self._rollouts[2]
        self._rollouts = (training, step, count + 1)
        first = self.accelerator.process_index * num_images
        return [(self.args.seed, int(training), step, count, first + i) for i in range(num_images)]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as TRL does, on the same random streams each time."""
        self._rollouts = (False, 0, 0)
        return super().evaluate(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, compute_entropy: bool = False, **kwargs: Any) -> Any:
        # Entropies cost nothing beside the log-probabilities; the last scoring is kept, because TRL hands neither the
        # reference's entropies nor the policy's log-probabilities to where STAGE needs them.
        timer = nullcontext() if torch.is_grad_enabled() else self.timed("reference")
        with timer:
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
                *args, compute_entropy=True, **kwargs
            )
        self._scored = (logps, entropies)
        return logps, entropies if compute_entropy else None, aux_loss

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        with self.timed("reward"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.reward_threads.ahead:
            self._log("seconds/reward_work", torch.tensor(self.reward_threads.work_seconds))
        self._log("reward_failures", rewards.isnan().any(dim=1).sum())
        rewards[:, self._own], self.reward_weights[self._own] = self.reward_sum.take_in(
            rewards[:, self._own], self._group_size, self.model.training
        )
        policy_entropy = self._gather(torch.tensor([row["policy_entropy"] for row in inputs], device=rewards.device))
        self._log("entropy/policy", policy_entropy)
        if self.beta != 0 and self._scored is not None:
            ref_entropy = self._gather(self._scored[1].mean(dim=1))
            self._log("entropy/reference", ref_entropy)
            self._log("entropy/gap", (ref_entropy - policy_entropy).abs())
            if self.args.entropy_reward_weight:
                rewards[:, -1] = self._entropy_rewards(rewards[:, :-1], policy_entropy, ref_entropy)
                self._log("entropy_reward", rewards[:, -1])
        # Whatever the aggregation, not normalised within the groups: that makes a large spread of any difference.
        self._total_rewards = objective.weighted_sum(rewards, self.reward_weights)
        return rewards

    def _entropy_rewards(self, rewards: Tensor, policy_entropy: Tensor, ref_entropy: Tensor) -> Tensor:
        """STAGE's bonus for all N samples, NaN where no reward could score one."""
        total = self.reward_sum.totals(rewards, self.reward_weights[:-1], self._group_size)
        bonus = entropy_reward(
            total,
            policy_entropy,
            ref_entropy,
            self._group_size,
            scope=self.args.entropy_reward_scope,
            center=self.args.entropy_reward_center,
        )
        return bonus.masked_fill(total.isnan(), torch.nan)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        start = clock(self.accelerator.device)
        with self.reward_threads.batch(inputs):
            output = super()._generate_and_score_completions(inputs)
        scored, self._scored = self._scored, None
        if self.args.entropy_loss_weight and scored is not None:
            output["ref_entropy"] = scored[1].mean(dim=1)
        weights = self._token_weights(inputs, output)
        output.update(weights)
        elapsed = clock(self.accelerator.device) - start
        self._generation_seconds += elapsed
        num_images = len(inputs) * self.accelerator.num_processes
        self._log("images_per_second", torch.tensor(num_images / elapsed))
        if self.model.training:  # an evaluation's images are no step's samples
            samples = trl_seams.step_samples(self, inputs, weights, self._total_rewards, self._group_size)
            self.run_folder.samples = samples
        return output

    def _token_weights(self, rows: list[dict[str, Any]], output: dict[str, Any]) -> dict[str, Tensor]:
        """Weights of this process's tokens; groups may be split over processes, so tokens are gathered first."""
        batch = trl_seams.token_batch(self, rows, output, self._total_rewards, self._group_size)
        guard: Any = (self.args.min_reward_std, self.args.kl_on_zero_variance)
        weights, further = token_weights(self._weighting, batch, *guard)
        self._log("unique_images", unique_share(batch.codes, self._group_size))
        for name, values in {**further, **weights}.items():
            if name != "advantages":
                self._log(f"{name}/mean", values)
                self._log(f"{name}/std", values.std())
        if "advantage_weights" in weights:
            self._log("advantage_weights/min", weights["advantage_weights"].min())
            self._log("advantage_weights/max", weights["advantage_weights"].max())
        first = self.accelerator.process_index * len(rows)
        return {name: values[first : first + len(rows)] for name, values in weights.items()}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        assert self._scored is not None, "TRL no longer scores in _compute_loss: see tests/test_trl_seams.py"
        (logps, entropies), self._scored = self._scored, None
        if "kl_weights" in inputs and self.beta != 0:
            per_token_kl = objective.kl_k3(logps, inputs["ref_per_token_logps"])
            weighted = inputs["kl_weights"] * per_token_kl
            self._log("kl_weighted", self._gather(weighted.detach().mean(dim=1)))
            change = weighted - per_token_kl  # TRL's loss already holds the unweighted KL
            if self.args.use_bias_correction_kl:
                change = change * self._ratio(logps, inputs.get("old_per_token_logps"))
            loss = loss + self.beta * self._mean(change)
        if "ref_entropy" in inputs:
            gap = entropy_loss(entropies.mean(dim=1), inputs["ref_entropy"])
            self._log("entropy_loss", self._gather(gap.detach()))
            loss = loss + self.args.entropy_loss_weight * gap / self._accumulation
        return loss

    def _ratio(self, logps: Tensor, old_logps: Tensor | None) -> Tensor:
        log_ratio = logps - (logps.detach() if old_logps is None else old_logps)
        if self.importance_sampling_level == "sequence":
            log_ratio = log_ratio.mean(dim=1, keepdim=True)
        return log_ratio.exp()

    def _mean(self, per_token: Tensor) -> Tensor:
        """Reduce (B, T) as TRL's loss types do: with images of equal length all but one are the mean."""
        scale = per_token.shape[1] if self.loss_type == "luspo" else 1
        return scale * per_token.mean() / self._accumulation

    @property
    def _accumulation(self) -> int:
        return self.current_gradient_accumulation_steps if self.model.training else 1

    @property
    def _group_size(self) -> int:
        size: Any = self.num_generations if self.model.training else self.num_generations_eval
        return size

    def _gather(self, tensor: Tensor) -> Tensor:
        """Join the processes' parts along the first dimension."""
        gathered: Any = self.accelerator.gather(tensor)
        return gathered

    def _log(self, name: str, value: Tensor) -> None:
        """Add the mean of a tensor to a metric, leaving NaN out."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(value.float().nanmean().item())

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take TRL's training step and time the part of it that is not generation."""
        start, self._generation_seconds = clock(self.accelerator.device), 0.0
        loss = super().training_step(*args, **kwargs)
        self._update_seconds += clock(self.accelerator.device) - start - self._generation_seconds
        if self.accelerator.sync_gradients:
            self._metrics["train"]["seconds/update"].append(self._update_seconds)
            self._metrics["train"]["memory/peak_mb"].append(peak_memory_mb())
            self._update_seconds = 0.0
        return loss
