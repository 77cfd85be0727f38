"""One training step of a real `StageTrainer`, phase by phase, on a model of a chosen size; for step.py and scaling.py.

Nothing of the step is written here: rollout, scoring, token weights and loss are the trainer's own methods. What is
measured here is put around them, in the places where the trainer itself measures.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from memory import peak_bytes, reset_peak
from PIL import Image
from reward_bound import wait
from rollout import TINY, build_policy
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from stage_grpo import trl_seams
from stage_grpo.config import StageConfig
from stage_grpo.entropy import token_entropy
from stage_grpo.policy import load_policy, load_tokenizer
from stage_grpo.policy.base import ImagePolicy, left_pad
from stage_grpo.policy.janus import JanusPolicy
from stage_grpo.rollout import Rollout
from stage_grpo.shapes import tiny
from stage_grpo.trainer import StageTrainer

PROMPTS = ("a photo of a red circle", "a photo of two rings", "a photo of a blue cross", "a photo of three squares")
REWARDS = (0.0, 1.0, 0.25, 1.0, 0.5, 0.75, 0.0, 1.0)
"""Of the images of a group: ties at the top, as rule-based rewards give, and no image at the mean."""
CHANGE = 0.02
"""How far the policy stands from the reference, as a share of each weight's spread, so that the KL is not 0."""


@dataclass
class Meter:
    """Seconds of wall and processor time and peak memory of phases that do not overlap.

    Attributes:
        wall: Seconds of each phase.
        cpu: Seconds of all threads.
        peaks: Bytes of the process, or of the GPU, at the worst moment of each phase; filled where `with_memory`.
        with_memory: Whether to look. The process's own mark is reset at the beginning of each phase.
    """

    wall: Counter[str] = field(default_factory=Counter)
    cpu: Counter[str] = field(default_factory=Counter)
    peaks: Counter[str] = field(default_factory=Counter)
    with_memory: bool = False

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """As `StageTrainer.timed`, which it stands in for."""
        if self.with_memory:
            self.mark("between phases")
        wait()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        wait()
        self.wall[phase] += time.perf_counter() - wall
        self.cpu[phase] += time.process_time() - cpu
        if self.with_memory:
            self.mark(phase)

    def mark(self, phase: str) -> None:
        """Book the peak since the last mark under a phase."""
        self.peaks[phase] = max(self.peaks[phase], peak_bytes())
        reset_peak()


def write_checkpoint(size: str, side: int, folder: Path) -> Path:
    """A checkpoint with a tokenizer: the shipped one, `mid` of rollout.py, or a `grid`: a tiny Janus of other images.

    Weights of the last two are random.
    """
    if size == "tiny":
        return TINY
    tokenizer = tiny.build_text_tokenizer()
    if size == "mid":
        policy = build_policy("mid", side)
    else:
        config = tiny.build_config(tokenizer)
        config.vq_config.num_patches = side
        config.vision_config.image_size = side * config.vision_config.patch_size
        config.vision_config.num_image_tokens = side * side
        config.text_config.max_position_embeddings = side * side + 64
        torch.manual_seed(0)
        policy = JanusPolicy(config)
    for name in ("bos", "eos", "pad"):
        setattr(policy.config.get_text_config(), f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        setattr(policy.generation_config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fixed_reward(images: list[Image.Image], prompts: list[str], metadata: list[dict]) -> list[float]:
    """A score by an image's place, which costs nothing and is the same for everybody."""
    return [REWARDS[i % len(REWARDS)] for i in range(len(images))]


def build_trainer(checkpoint: Path, out: Path, num_prompts: int, group: int, **changes: Any) -> StageTrainer:
    """A trainer of the released method as it is when training begins: checkpointing on, optimizer made.

    The learning rate is 0: the optimizer does all its work, and every step meets the same weights.
    """
    values = {
        "preset": "released",
        "per_device_train_batch_size": num_prompts * group,
        "num_generations": group,
        "max_steps": 1,
        "learning_rate": 0.0,
        "gradient_checkpointing": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "sample_steps": 0,
        "use_cpu": not torch.cuda.is_available(),
    }
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(num_prompts)]
    rows = Dataset.from_dict({"prompt": prompts, "metadata": ["{}"] * num_prompts})
    policy = load_policy(checkpoint)
    tokenizer = load_tokenizer(policy)
    args = StageConfig(str(out), **{**values, **changes})
    trainer = StageTrainer(policy, fixed_reward, args, rows, processing_class=tokenizer)
    move_from_reference(trainer.model)
    if args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
    trainer.create_optimizer()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


@torch.no_grad()
def move_from_reference(policy: ImagePolicy) -> None:
    """Add a little noise to every trained matrix."""
    noise = torch.Generator(policy.device).manual_seed(0)
    for parameter in policy.parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            draw = torch.randn(parameter.shape, generator=noise, device=parameter.device)
            parameter.add_(CHANGE * parameter.std() * draw)


def rows_of(trainer: StageTrainer) -> list[dict[str, Any]]:
    """One generation batch: every prompt `num_generations` times."""
    return [dict(row) for row in trainer.train_dataset for _ in range(trainer.num_generations)]


def prompt_ids_of(trainer: StageTrainer) -> list[list[int]]:
    return trainer.model.encode_prompts(trainer.processing_class, [row["prompt"] for row in rows_of(trainer)])


def random_codes(trainer: StageTrainer) -> torch.Tensor:
    """Codes (B, T) of a seed, for steps without a rollout."""
    policy = trainer.model
    draws = torch.Generator().manual_seed(0)
    shape = (len(rows_of(trainer)), policy.num_image_tokens)
    codes = torch.randint(policy.get_output_embeddings().out_features, shape, generator=draws)
    return codes.to(policy.device)


@torch.no_grad()
def give_codes(trainer: StageTrainer, codes: torch.Tensor) -> None:
    """Let the trainer's rollouts and decodings cost nothing: they give these codes, and blank images."""
    policy, prompt_ids = trainer.model, prompt_ids_of(trainer)
    logps, entropies = [], []
    for ids, row in zip(prompt_ids, codes):  # one at a time, so that this is no peak
        prompt, mask = (x.to(policy.device) for x in left_pad([ids], policy.pad_token_id))
        features = policy.head_features(torch.cat([prompt, row[None]], dim=1), policy.attention_mask_with_image(mask))
        logits = policy.image_logits(features[0])
        logps.append(torch.log_softmax(logits, dim=-1).gather(1, row[:, None])[:, 0])
        entropies.append(token_entropy(logits))
    scores = [torch.stack(logps), torch.stack(entropies)]
    given = Rollout(prompt_ids, codes, *scores, *scores)
    blank = np.zeros((len(codes), 8, 8, 3), dtype=np.uint8)

    def recall(prompts: list[str], trainer: StageTrainer) -> dict[str, Any]:
        with (
            mock.patch.object(trl_seams, "rollout", lambda *_, **__: given),
            mock.patch.object(trl_seams, "decode_images", lambda *_, **__: blank),
        ):
            return trl_seams.sample_images(prompts, trainer)

    trainer.rollout_func = recall


def update(trainer: StageTrainer, meter: Meter, batch: dict[str, Any]) -> float:
    """Forward and backward of each micro-batch, clipping and AdamW. The gradients stay."""
    trainer.optimizer.zero_grad()
    total = 0.0
    # As TRL cuts a rollout.
    for part in split_tensor_dict(shuffle_sequence_dict(batch), trainer.args.steps_per_generation):
        with meter.timed("policy forward"):
            loss = trainer._compute_loss(trainer.model, part)
        with meter.timed("backward"):
            loss.backward()
        total += loss.item()
    optimize(trainer, meter)
    return total


def optimize(trainer: StageTrainer, meter: Meter) -> None:
    with meter.timed("optimizer"):
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()


def stage_step(trainer: StageTrainer, meter: Meter) -> tuple[float, torch.Tensor]:
    """A whole step of the trainer; gives its loss and its images as codes."""
    trainer.timed = meter.timed
    weigh = StageTrainer._token_weights.__get__(trainer)

    def weigh_timed(*args: Any) -> dict[str, torch.Tensor]:
        with meter.timed("token weights"):
            return weigh(*args)

    trainer._token_weights = weigh_timed
    wall, cpu = time.perf_counter(), time.process_time()
    batch = trainer._generate_and_score_completions(rows_of(trainer))
    loss = update(trainer, meter, batch)
    meter.wall["step"] = time.perf_counter() - wall
    meter.cpu["step"] = time.process_time() - cpu
    return loss, batch["completion_ids"]


def gradients(trainer: StageTrainer) -> torch.Tensor:
    """All of them in a row."""
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def clear(folder: Path) -> None:
    """Forget a checkpoint that was written for a benchmark."""
    gc.collect()
    if folder != TINY:
        shutil.rmtree(folder, ignore_errors=True)
