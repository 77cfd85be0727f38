"""Merging a LoRA adapter into its base, as a checkpoint of its own: the command ``stage merge``."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from stage_grpo.checkpoints.errors import need, write_json
from stage_grpo.checkpoints.manifest import describe
from stage_grpo.checkpoints.template import MERGE, trained_template
from stage_grpo.command_line import ArgumentParser
from stage_grpo.policy.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter, read_adapter

DTYPES = ("auto", "bfloat16", "float32")


def merge(adapter: str | Path, out: str | Path, base: str | Path | None = None, dtype: str = "auto") -> Path:
    """Write the checkpoint that an adapter and its base make together.

    The result is an ordinary checkpoint in transformers' format with weights, config, generation config, tokenizer and
    processor, and ``merge.json``, which says what it was made from. It appears under its name only when it is whole.

    Args:
        adapter: Output folder of a run with ``use_peft``, or one of its checkpoints.
        out: Folder to write; must not exist or be empty.
        base: Checkpoint that the adapter belongs to; by default the one that its config names.
        dtype: Dtype of the weights: ``"float32"``, ``"bfloat16"``, or ``"auto"`` for that of the base.

    Returns:
        ``out``.

    Raises:
        ValueError: If ``adapter`` is no adapter, is torn, or does not fit its base; if the base cannot be loaded; if
            ``out`` is a file or not empty; if ``dtype`` is unknown or the disk too full.
        OSError: If ``out`` cannot be written.
    """
    from safetensors import SafetensorError
    from transformers import AutoProcessor

    from stage_grpo.policy.loading import checkpoint_of, load_policy

    source, target = Path(adapter), Path(out).resolve()
    need(dtype in DTYPES, f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    need(is_adapter(source), f"{source} holds no {ADAPTER_CONFIG}; give the output folder of a LoRA run")
    _check_target(target)
    policy: Any = load_policy(source, dtype, base=base)
    processor = AutoProcessor.from_pretrained(checkpoint_of(policy))
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_space(target.parent, policy)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        work = Path(scratch) / target.name
        try:
            policy.save_pretrained(work)
        except SafetensorError as error:
            raise ValueError(f"{work} cannot be written: {error}; make room, or choose another folder") from error
        processor.save_pretrained(work)
        write_json(work / MERGE, _record(source, base))
        if target.exists():
            target.rmdir()
        os.replace(work, target)
    return Path(out)


def _record(source: Path, base: str | Path | None) -> dict[str, Any]:
    adapter = read_adapter(source, base)
    files = describe([source / ADAPTER_CONFIG, source / ADAPTER_WEIGHTS])
    scale = {"lora_r": adapter.config.r, "lora_alpha": adapter.config.lora_alpha}
    template = trained_template(source)
    return {"adapter": str(source), "base": adapter.base, **scale, "prompt_template": template, "files": files}


def _check_target(target: Path) -> None:
    need(not target.is_file(), f"{target} is a file; name a folder, which need not exist")
    empty = not target.is_dir() or not any(target.iterdir())
    need(empty, f"{target} is not empty; choose another folder or remove it")


def _check_space(folder: Path, policy: Any) -> None:
    needed = sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters())
    free = shutil.disk_usage(folder).free
    need(free > needed, f"{folder} has {free / 1e9:.1f} GB free, the checkpoint needs {needed / 1e9:.1f}; make room")


def main_merge(program: str, words: list[str]) -> str:
    """Run ``stage merge ADAPTER OUT [--base PATH] [--dtype auto|bfloat16|float32]``.

    Args:
        program: Name shown in the help, e.g. ``"stage merge"``.
        words: Remaining words of the command line.

    Returns:
        The line to print.

    Raises:
        ValueError: If the words, the adapter or its base are wrong, see `merge`.
        OSError: If the destination cannot be written.
    """
    parser = ArgumentParser(
        prog=program, description="Merge a LoRA adapter into its base and write a whole checkpoint."
    )
    parser.add_argument("adapter", help="output folder of a LoRA run, or one of its checkpoints")
    parser.add_argument("out", help="folder to write; must not exist or be empty")
    parser.add_argument("--base", help="checkpoint the adapter was trained on (the one its config names)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the weights (auto: the base's own)")
    options = parser.parse_args(words)
    return f"wrote {merge(options.adapter, options.out, options.base, options.dtype)}"
