"""Converting a checkpoint between DeepSeek's original format and transformers' format."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from tqdm import tqdm

from stage_grpo.checkpoints import configs, names
from stage_grpo.checkpoints.errors import need, read_json, shorten, write_json
from stage_grpo.checkpoints.layout import Layout, check_tensor, is_rotary_table, layout_of, unit_codebook
from stage_grpo.checkpoints.manifest import MANIFEST, describe, write_manifest
from stage_grpo.checkpoints.shards import (
    INDEXES,
    MAX_SHARD_BYTES,
    ShardWriter,
    indexed_names,
    read_tensors,
    weight_files,
    write_tensors,
)
from stage_grpo.checkpoints.template import trained_template

KEPT = "original_only.safetensors"
"""What only the original format has, kept beside converted weights for the way back."""
_SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    KEPT,
    *INDEXES,
)


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = configs.TRANSFORMERS,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Convert a Janus or Janus-Pro checkpoint to the other format.

    Weights are read and written one tensor at a time, in the dtype they have. Every tensor is accounted for. The
    result appears under its name only when it is whole, with a manifest ``conversion.json``.

    Going to transformers' format, what that format lacks (the vision tower's pooling head and the codebook's usage
    count, which no computation reads, and codebook rows of a length other than one) is kept in
    ``original_only.safetensors``, so that the way back gives the same bytes. On the way back without that file, the
    unused tensors are zeros; the manifest lists them.

    Args:
        src: Checkpoint folder, weights as safetensors or pytorch files, sharded or not.
        dst: Folder to write; it must not exist.
        to: ``"transformers"`` or ``"original"``.
        overwrite: Replace ``dst`` if it holds an earlier conversion.
        max_shard_bytes: Size at which a new output file is begun.

    Returns:
        ``dst``.

    Raises:
        ValueError: If ``src`` is no checkpoint of the other format; if a tensor is unknown, missing or of the wrong
            shape; if a file is torn or holds more than tensors; if ``dst`` exists; if the disk is too full.
        OSError: If ``dst`` cannot be written.
    """
    source, target = Path(src).resolve(), Path(dst).resolve()
    need(to in configs.MODEL_TYPES.values(), f"to={to!r} is not a format; choose 'transformers' or 'original'")
    need(configs.format_of(source) != to, f"{source} is in {to} format already; use it as it is")
    files = weight_files(source)
    _check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_space(target.parent, files)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        work = Path(scratch) / target.name
        work.mkdir()
        job = _Job(source, work, files, ShardWriter(work, max_shard_bytes))
        (_write_transformers if to == configs.TRANSFORMERS else _write_original)(job)
        _finish(job, to)
        if target.exists():
            os.replace(target, Path(scratch) / "replaced")
        os.replace(work, target)
    return Path(dst)


@dataclass
class _Job:
    """One conversion under way."""

    source: Path
    work: Path
    files: list[Path]
    writer: ShardWriter
    seen: set[str] = field(default_factory=set)
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that only the original format has."""
    zeros: list[str] = field(default_factory=list)
    """Unused tensors of the original format that had to be made up."""
    parts: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """Parts of a tensor of the original format that wait for the others."""


def _write_transformers(job: _Job) -> None:
    from transformers import GenerationConfig

    from stage_grpo.checkpoints import processor

    tokenizer = processor.read_original_tokenizer(job.source)
    ids = processor.token_ids(tokenizer)
    config: Any = configs.to_transformers_config(read_json(job.source / "config.json"), ids)
    layout = layout_of(config)
    expected = layout.expected(original=True)
    for file, name, tensor in _stream(job):
        if is_rotary_table(name):
            job.kept[name] = tensor.clone()
            continue
        check_tensor(name, tensor, expected, file)
        _add_for_transformers(job, layout, name, tensor)
    _check_whole(job, expected, layout.optional)
    job.writer.close()
    if job.kept:
        write_tensors(job.kept, job.work / KEPT)
    config.dtype = _main_dtype(job.writer)
    config.save_pretrained(job.work)
    GenerationConfig(
        do_sample=True,
        guidance_scale=5.0,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
        # transformers' image generation looks its begin-of-image token up in here.
        generation_kwargs={"boi_token_id": ids["boi"]},
    ).save_pretrained(job.work)
    count = config.vision_config.num_image_tokens
    processor.write_transformers_processor(tokenizer, job.source, job.work, count)


def _add_for_transformers(job: _Job, layout: Layout, name: str, tensor: Shaped[Tensor, "*shape"]) -> None:
    if name in layout.original_only:
        job.kept[name] = tensor.clone()
        return
    if name == names.CODEBOOK:
        unit = unit_codebook(tensor)
        if unit is not tensor:
            job.kept[name], tensor = tensor.clone(), unit
    if name == names.POSITIONS:
        tensor = tensor[0]
    new_names = names.to_transformers(name)
    for new, part in zip(new_names, tensor.chunk(len(new_names)), strict=True):
        job.writer.add(new, part)


def _write_original(job: _Job) -> None:
    from transformers import JanusConfig

    from stage_grpo.checkpoints.processor import write_original_processor

    config: Any = JanusConfig.from_dict(read_json(job.source / "config.json"))
    translated = configs.to_original_config(config)
    layout = layout_of(config)
    job.kept = dict(read_tensors(job.source / KEPT)) if (job.source / KEPT).is_file() else {}
    for file, name, tensor in _stream(job):
        check_tensor(name, tensor, layout.transformers, file)
        _add_for_original(job, name, tensor)
    _check_whole(job, layout.transformers, layout.optional)
    _add_unused(job, layout)
    job.writer.close()
    dtype = _main_dtype(job.writer)
    translated["torch_dtype"] = translated["language_config"]["torch_dtype"] = dtype
    write_json(job.work / "config.json", translated)
    vision = config.vision_config
    write_original_processor(job.source, job.work, vision.image_size, vision.num_image_tokens)


def _add_for_original(job: _Job, name: str, tensor: Shaped[Tensor, "*shape"]) -> None:
    place = names.to_original(name)
    assert place is not None  # the layout holds names with a place alone
    stored, part, count = place
    if count > 1:
        waiting = job.parts.setdefault(stored, {})
        waiting[part] = tensor.clone()
        if len(waiting) == count:
            job.writer.add(stored, torch.cat([waiting[i] for i in range(count)]))
            del job.parts[stored]
        return
    if stored == names.POSITIONS:
        tensor = tensor[None]
    if stored == names.CODEBOOK:
        rows = job.kept.pop(stored, None)
        # Rows that the checkpoint was converted from are put back, unless its codebook has been trained since.
        if rows is not None and torch.equal(unit_codebook(rows).to(tensor.dtype), tensor):
            tensor = rows
    job.writer.add(stored, tensor)


def _add_unused(job: _Job, layout: Layout) -> None:
    """Add what only the original format has, as it was or as zeros."""
    for name, shape in layout.original_only.items():
        tensor = job.kept.pop(name, None)
        if tensor is None:
            tensor = torch.zeros(shape, dtype=getattr(torch, _main_dtype(job.writer)))
            job.zeros.append(name)
        check_tensor(name, tensor, layout.original_only, KEPT)
        job.writer.add(name, tensor)
    for name, tensor in job.kept.items():
        need(is_rotary_table(name), f"{job.source / KEPT}: tensor {name!r} has no place in the original format")
        job.writer.add(name, tensor)


def _stream(job: _Job) -> Iterator[tuple[str, str, Tensor]]:
    """Every tensor of the source with the file it stands in, each name once."""
    for path in tqdm(job.files, desc=f"convert {job.source.name}", unit="file"):
        for name, tensor in read_tensors(path):
            need(name not in job.seen, f"{path}: tensor {name!r} stands in another file too; download it again")
            job.seen.add(name)
            yield path.name, name, tensor


def _check_whole(job: _Job, expected: dict[str, Any], optional: frozenset[str]) -> None:
    missing = sorted((expected.keys() - optional | indexed_names(job.source)) - job.seen)
    need(not missing, f"{job.source} lacks {len(missing)} tensors: {shorten(missing)}; download the whole checkpoint")


def _main_dtype(writer: ShardWriter) -> str:
    return max(writer.dtypes, key=lambda name: writer.dtypes[name])


def _finish(job: _Job, to: str) -> None:
    small = [job.source / name for name in _SMALL_FILES if (job.source / name).is_file()]
    kept = sorted(job.kept) if to == configs.TRANSFORMERS else []
    write_manifest(
        job.work,
        format=to,
        source=describe([*job.files, *small]),
        prompt_template=trained_template(job.source),
        num_source_tensors=len(job.seen),
        num_tensors=len(job.writer.names),
        num_values_by_dtype=job.writer.dtypes,
        kept_in_original_only=kept,
        made_of_zeros=job.zeros,
    )


def _check_target(target: Path, overwrite: bool) -> None:
    need(overwrite or not target.exists(), f"{target} exists already; choose another folder, or say --overwrite")
    need(
        not target.exists() or (target / MANIFEST).is_file(),
        f"{target} is no earlier conversion and is not replaced; move it away, or choose another folder",
    )


def _check_space(folder: Path, files: list[Path]) -> None:
    needed = sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(folder).free
    need(free > needed, f"{folder} has {free / 1e9:.1f} GB free, the conversion needs {needed / 1e9:.1f}; make room")
