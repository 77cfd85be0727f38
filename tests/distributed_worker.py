"""Trains the tiny Janus for two steps in however many processes it is started with; run by test_distributed.py."""

import os
import sys

from datasets import Dataset

from conftest import PROMPTS
from stage_grpo.policy import load_policy
from stage_grpo.trainer import StageTrainer
from test_trainer import brightness, config

if __name__ == "__main__":
    checkpoint, folder, images_per_process = sys.argv[1:]
    args = config(
        folder,
        per_device_train_batch_size=int(images_per_process),
        num_generations=8,
        max_steps=2,
        optim="sgd",
        learning_rate=0.5,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        use_cpu=True,
        sample_steps=1,
        guidance_in_scoring=True,
    )
    rows = Dataset.from_dict({"prompt": PROMPTS, "metadata": ["{}"] * 4})
    trainer = StageTrainer(load_policy(checkpoint), brightness, args, rows)
    trainer.train()
    trainer.save_model(folder)
