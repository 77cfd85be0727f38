"""Twenty steps of full STAGE on the shapes world, recorded by one version of the code and replayed by another.

Sampling turns rounding into other images, after which nothing compares. So the recording keeps the codes: a replay
computes and draws as ever, but wherever it has drawn a code it goes on with the recorded one.

``fixtures/golden_trajectory.npz`` was made by commit 8e22757, the last before rollout and scoring were made fast. This
file runs with the code of either time; it needs the same model and prompts, whose checksums are kept::

    git worktree add ../before 8e22757
    PYTHONPATH=../before/src OMP_NUM_THREADS=1 python tests/golden_trajectory.py tests/fixtures/golden_trajectory.npz

Arrays: ``commit``; ``inputs`` (2,), SHA-256 of model and prompts; ``codes`` (steps, B, T); ``metrics`` (steps, M)
called ``metric_names``; ``weights`` (W, 3) called ``weight_names``: for each parameter the norm of its change over all
steps and two projections of that change on random signs.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from stage_grpo import rollout, trl_seams
from stage_grpo.checksums import sha256_of
from stage_grpo.config import StageConfig
from stage_grpo.data import load_rows, to_dataset
from stage_grpo.policy import load_policy
from stage_grpo.preflight import build_rewards
from stage_grpo.run_folder import source_commit
from stage_grpo.sampling import image_uniforms
from stage_grpo.trainer import StageTrainer

ASSETS = Path(__file__).parents[1] / "assets"
MODEL = ASSETS / "tiny-janus-shapes"
PROMPTS = ASSETS / "shapes" / "train.jsonl"
NUM_STEPS, NUM_IMAGES = 20, 16
NO_RESULTS = ("seconds/", "memory/", "images_per_second", "guard/", "completions/", "step")
"""How metrics begin that are no results of the method: times, and what TRL says of text."""


def make_trainer(folder: str | Path) -> StageTrainer:
    """Full STAGE with the values of ``configs/shapes/stage.yaml``, but four prompts of four images a step."""
    config = StageConfig(
        str(folder),
        model=str(MODEL),
        rewards=["shapes"],
        preset="paper",
        beta=0.01,
        min_reward_std=0.02,
        num_generations=4,
        guidance_scale=1.0,
        per_device_train_batch_size=NUM_IMAGES,
        max_steps=NUM_STEPS,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        save_strategy="no",
        sample_steps=0,
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=0,
    )
    dataset = to_dataset(load_rows(str(PROMPTS)))
    return StageTrainer(load_policy(str(MODEL)), build_rewards(config), config, dataset)


class Replay:
    """A rollout's randomness with recorded codes put in.

    A random number in [0, 1) reaches the place where codes are drawn as ``code + number``, whatever order the rollout
    puts its rows in; there a code is drawn from the number, compared with the recorded one, and replaced by it.

    Attributes:
        differs: For each token of each rollout in turn, whether the drawn codes (B,) differ from the recorded ones.
    """

    def __init__(self, codes: np.ndarray):
        self.differs: list[np.ndarray] = []
        self._codes = iter(torch.from_numpy(codes.astype(np.int64)))
        # 8e22757 has the second name alone; what is handed over are probabilities or their logarithms.
        self._name = "draw_codes" if hasattr(rollout, "draw_codes") else "sample_codes"
        self._draw: Any = getattr(rollout, self._name)

    def patches(self) -> list[Any]:
        """Context managers that put the codes in."""
        return [
            mock.patch.object(trl_seams, "image_uniforms", self._numbers),
            mock.patch.object(rollout, self._name, self._recorded),
        ]

    def _numbers(self, keys: Any, num_image_tokens: int) -> torch.Tensor:
        return next(self._codes) + image_uniforms(keys, num_image_tokens)

    def _recorded(self, distribution: torch.Tensor, numbers: torch.Tensor, sampling: Any) -> torch.Tensor:
        codes = numbers.long()
        self.differs.append((self._draw(distribution, numbers - codes, sampling) != codes).numpy())
        return codes


def play(folder: str | Path, codes: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Train for all steps, with recorded codes or with freshly drawn ones.

    Returns:
        The arrays of the fixture, and for a replay ``differs`` (steps, B): whether any code of the image was drawn
        otherwise, in the order in which the rollout keeps its rows.
    """
    trainer = make_trainer(folder)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    replay = None if codes is None else Replay(codes)
    with ExitStack() as patches:
        sampled = patches.enter_context(mock.patch.object(trl_seams, "decode_images", wraps=trl_seams.decode_images))
        for patch in [] if replay is None else replay.patches():
            patches.enter_context(patch)
        trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    names = sorted(name for name in rows[0] if not name.startswith(NO_RESULTS))
    arrays = {
        "commit": np.array(source_commit()),
        "inputs": np.array([sha256_of(MODEL / "model.safetensors"), sha256_of(PROMPTS)]),
        "codes": np.stack([call.args[1].numpy().astype(np.int16) for call in sampled.call_args_list]),
        "metric_names": np.array(names),
        "metrics": np.array([[row[name] for name in names] for row in rows]),
        "weight_names": np.array(sorted(before)),
        "weights": np.stack([_moved(i, trainer.model, name, before[name]) for i, name in enumerate(sorted(before))]),
    }
    if replay is not None:
        differs = np.stack(replay.differs).reshape(NUM_STEPS, -1, NUM_IMAGES)
        arrays["differs"] = np.asarray(differs.any(axis=1))
    return arrays


def _moved(seed: int, model: torch.nn.Module, name: str, before: torch.Tensor) -> np.ndarray:
    change = (model.get_parameter(name).detach() - before).double().flatten().numpy()
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(2, change.size))
    return np.array([np.linalg.norm(change), *(signs @ change)])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        np.savez_compressed(sys.argv[1], allow_pickle=False, **play(scratch))
