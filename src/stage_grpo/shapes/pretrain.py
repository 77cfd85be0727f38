from __future__ import annotations

from pathlib import Path

import torch

from stage_grpo.shapes import tiny
from stage_grpo.shapes.pretrain_config import PretrainConfig
from stage_grpo.shapes.tokenizer_training import train_tokenizer


def pretrain(config: PretrainConfig) -> Path:
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    tokenizer = tiny.build_text_tokenizer()
    policy = tiny.build_policy(tokenizer)
    out = Path(config.out)
    train_tokenizer(policy.model.vqmodel, config, out / "checkpoints" / "tokenizer")
    return out
