"""The whole plane at once: a training of the tiny Janus on OCR, CLIP with random weights, and a reward over HTTP."""

import math

import pytest
import torch
from datasets import Dataset

import tiny_clip
from stage_grpo.policy import load_policy
from stage_grpo.rewards import server
from stage_grpo.rewards.base import as_reward
from stage_grpo.rewards.registry import build_reward
from stage_grpo.trainer import StageTrainer
from test_remote_rewards import start  # noqa: F401  (a fixture)
from test_trainer import brightness, config, logged

PROMPTS = ['a photo of a ring with "OK"', "a red circle"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return str(tiny_clip.save(tmp_path_factory.mktemp("clip")))


def test_three_kinds_of_rewards_train_together(checkpoint, clip_folder, tmp_path, start):  # noqa: F811
    rewards = [
        build_reward("ocr", {"detection_side": 64}),
        build_reward("clip", {"weights": clip_folder}),
        build_reward("brightness", {"url": start(server.make_app(as_reward(brightness)))}),
    ]
    policy = load_policy(checkpoint)
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    args = config(
        tmp_path, max_steps=2, per_device_train_batch_size=4, num_generations=2, reward_weights=[1.0, 5.0, 0.01]
    )
    trainer = StageTrainer(policy, rewards, args, Dataset.from_dict({"prompt": PROMPTS, "metadata": ["{}"] * 2}))
    trainer.train()
    for row in logged(tmp_path)[:2]:
        # Two of the four images have no quoted text in their prompt.
        assert row["reward_failures"] == 2 and 0 <= row["rewards/ocr/mean"] <= 1
        assert -1 <= row["rewards/clip/mean"] <= 1 and row["rewards/clip/std"] > 0
        assert 0 < row["rewards/brightness/mean"] < 255 and math.isfinite(row["loss"])
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before)
