"""Fixtures shared by the tests: an untrained tiny Janus on disk, made once a session."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

from original_janus import tiny_weights, write_original
from stage_grpo.checkpoints import convert
from stage_grpo.config import StageConfig
from stage_grpo.policy import load_policy, load_tokenizer
from stage_grpo.shapes import tiny

# transformers' own parser breaks the annotations of transformers' own fields (debug=None for a list).
StageConfig.__init__.__no_type_check__ = True

PROMPTS = [
    "a photo of a circle",
    "a photo of a red circle and a blue square",
    "a photo of two rings",
    "a photo of a cross left of a ring",
]


def save_untrained(folder, num_layers):
    """Save a tiny Janus with random weights that are spread enough to make distributions peaked."""
    torch.manual_seed(0)
    tokenizer = tiny.build_text_tokenizer()
    policy = tiny.build_policy(tokenizer, num_layers)
    with torch.no_grad():
        policy.get_output_embeddings().weight.normal_(0, 0.3)
        for parameter in policy.backbone.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.08)
    tiny.save(policy, tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of an untrained policy; two layers are as good as four for most tests, and twice as fast."""
    return save_untrained(tmp_path_factory.mktemp("checkpoint"), num_layers=2)


@pytest.fixture
def policy(checkpoint):
    """A freshly loaded policy that a test may change."""
    return load_policy(checkpoint).eval()


@pytest.fixture
def tokenizer(policy):
    return load_tokenizer(policy)


@pytest.fixture
def prompt_ids(policy, tokenizer):
    """Twelve rows: four prompts of different length, three images each."""
    return [ids for ids in policy.encode_prompts(tokenizer, PROMPTS) for _ in range(3)]


@pytest.fixture(scope="module")
def weights():
    """Tensors of a tiny Janus under DeepSeek's names."""
    return tiny_weights()


@pytest.fixture(scope="module")
def converted(tmp_path_factory, weights):
    """Folder of the same in transformers' format, made by the conversion."""
    folder = tmp_path_factory.mktemp("converted")
    return convert(write_original(folder / "original", weights), folder / "transformers")
