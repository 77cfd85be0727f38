"""Makes the tiny policy from nothing: image tokenizer first, then the language model on its codes."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from stage_grpo.shapes import tiny
from stage_grpo.shapes.policy_training import train_policy
from stage_grpo.shapes.pretrain_config import PretrainConfig
from stage_grpo.shapes.tokenizer_training import train_tokenizer

CHECKPOINTS = "checkpoints"
"""Subfolder of the output that an interrupted run resumes from; of no use afterwards."""
RECORD = "pretrain.json"
"""What made the policy: settings, seconds, versions."""


def pretrain(config: PretrainConfig) -> Path:
    """Train the tiny policy and save it, in transformers' format.

    A run that was interrupted goes on from its last checkpoints when called again with the same settings, and a
    finished one returns at once. Equal settings on equal machines give equal weights.

    Args:
        config: settings; the defaults made the shipped policy.

    Returns:
        The folder: weights, configs, tokenizer, processor and `RECORD`.

    Raises:
        ValueError: checkpoints that cannot be read, or that other settings made.
        OSError: the folder cannot be written.
    """
    torch.set_num_threads(config.threads)
    out = Path(config.out)
    checkpoints = out / CHECKPOINTS
    checkpoints.mkdir(parents=True, exist_ok=True)
    _check_settings(checkpoints / "settings.json", config)
    tokenizer = tiny.build_text_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        policy = tiny.build_policy(tokenizer)
    seconds = {"tokenizer": train_tokenizer(policy.model.vqmodel, config, checkpoints / "tokenizer")}
    seconds["policy"] = train_policy(policy, tokenizer, config, checkpoints / "policy")
    tiny.save(policy, tokenizer, out)
    record = {
        "settings": _settings(config),
        "seconds": {stage: round(value) for stage, value in seconds.items()},
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy", "pillow")},
        "python": platform.python_version(),
    }
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return out


def _settings(config: PretrainConfig) -> dict[str, object]:
    """Settings that shape the weights."""
    return {name: value for name, value in asdict(config).items() if name not in ("out", "save_every")}


def _check_settings(file: Path, config: PretrainConfig) -> None:
    """Refuse to resume a run that other settings began."""
    wanted = json.loads(json.dumps(_settings(config)))
    if not file.exists():
        file.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    if changed:
        raise ValueError(
            f"{file.parent} was begun with {changed[0]}={found.get(changed[0])!r}, not {wanted[changed[0]]!r}: "
            "choose another out, or delete that folder to start anew"
        )
