"""Writing images for prompts: the rollout engine, tiles fixed by the plan, sets that can be continued.

The plan (all images, prompt by prompt) is cut into tiles of ``batch_size`` consecutive images. A tile is always
sampled whole, by whichever process it falls to and even if only one of its images is missing: arithmetic in a batch
depends on the batch's shape, so this is what makes every bit independent of the number of processes and of what was
there before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Int
from PIL import Image
from tqdm.auto import tqdm

from stage_grpo.evaluation.score_files import set_scores_aside
from stage_grpo.generation.checkpoint_hash import checkpoint_sha256
from stage_grpo.images.files import remove_leftovers
from stage_grpo.images.generated_set import GeneratedSet, claim
from stage_grpo.images.layouts import LAYOUTS, plan_images, side_folder
from stage_grpo.images.set_files import GENERATION, begun_layouts, remove_set
from stage_grpo.policy.base import ImagePolicy
from stage_grpo.rollout import bytes_per_row, decode_images, memory_budget, rollout
from stage_grpo.sampling import Sampling, image_uniforms
from stage_grpo.types import PromptRow

MAX_BATCH_SIZE = 64
"""Images of a tile, unless told otherwise: more are hardly faster, and few tiles share out badly."""
BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
"""Progress in images a second, however slow."""
_PACKAGES = ("stage-grpo", "torch", "transformers", "numpy", "pillow")


@dataclasses.dataclass(frozen=True)
class Generated:
    """What a call of :func:`generate` did.

    Attributes:
        folder: Where the images lie.
        num_written: Images that it made.
        num_kept: Images of its share that were there already.
        complete: Whether the set is complete now; other processes may still be at work.
    """

    folder: Path
    num_written: int
    num_kept: int
    complete: bool


def sample(
    policy: ImagePolicy,
    tokenizer: Any,
    prompts: Sequence[str],
    keys: Sequence[tuple[int, ...]],
    sampling: Sampling,
    prompt_template: str = "janus",
) -> list[Image.Image]:
    """Sample one RGB image a prompt, all in one batch.

    Args:
        policy: The policy.
        tokenizer: Its tokenizer.
        prompts: One an image; equal neighbours share their prefix.
        keys: Name of each image's random stream, see :func:`~stage_grpo.sampling.image_uniforms`.
        sampling: Guidance, temperature and truncation.
        prompt_template: A name in ``PROMPT_TEMPLATES``.

    Raises:
        ValueError: If the batch does not fit into the GPU's memory, or a prompt is empty.
    """
    prompt_ids = policy.encode_prompts(tokenizer, prompts, prompt_template)
    return sample_tile(policy, prompt_ids, keys, sampling)[1]


def sample_tile(
    policy: ImagePolicy, prompt_ids: list[list[int]], keys: Sequence[tuple[int, ...]], sampling: Sampling
) -> tuple[Int[np.ndarray, "B T"], list[Image.Image]]:
    """Sample codes in one batch, whatever the memory, and decode them one by one.

    The decoder's last bits depend on the batch, too, and a pixel is cut to a whole number.

    Args:
        policy: The policy.
        prompt_ids: Token ids of each image's prompt.
        keys: Name of each image's random stream.
        sampling: Guidance, temperature and truncation.

    Returns:
        The codes, and RGB images.

    Raises:
        ValueError: If the batch does not fit into the GPU's memory.
    """
    uniforms = image_uniforms(keys, policy.num_image_tokens)
    try:
        codes = rollout(policy, prompt_ids, uniforms, sampling, budget=sys.maxsize).codes
        pixels = [decode_images(policy, codes[i : i + 1])[0] for i in range(len(codes))]
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"batch_size={len(keys)} does not fit into the GPU's memory; give a smaller --batch-size, with another "
            f"--out or --overwrite if the folder was begun ({str(error).splitlines()[0]})"
        ) from error
    return codes.cpu().numpy(), [Image.fromarray(image) for image in pixels]


def generate(
    policy: ImagePolicy,
    tokenizer: Any,
    rows: Sequence[PromptRow],
    out: str | Path,
    sampling: Sampling,
    *,
    num_images: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    prompt_template: str = "janus",
    layout: str = "geneval",
    model: str | Path | None = None,
    share: tuple[int, int] = (0, 1),
    overwrite: bool = False,
) -> Generated:
    """Generate images of prompts into a folder, or go on with a folder that was begun with the same settings.

    Args:
        policy: The policy, on the device to use.
        tokenizer: Its tokenizer.
        rows: Prompts with their metadata.
        out: Folder to write.
        sampling: Guidance, temperature and truncation.
        num_images: Images of each prompt.
        seed: Seed of the run; image ``k`` of prompt ``i`` is drawn from the stream ``(seed, i, k)``.
        batch_size: Images of a tile; by default the folder's, else what memory allows, at most ``MAX_BATCH_SIZE``.
        prompt_template: A name in ``PROMPT_TEMPLATES``.
        layout: A name in ``LAYOUTS``.
        model: Where the policy was loaded from, recorded with its checksum; None for a policy in memory.
        share: Which process this is, from 0, and how many share the work. Tiles go round.
        overwrite: Begin anew: delete the set that was begun in the folder, once nothing else can be refused.

    Raises:
        ValueError: If the folder holds something else or was begun with other settings, a prompt is empty or there are
            none, a number is out of range, or a batch does not fit into the GPU's memory.
    """
    _check_numbers(rows, num_images, seed, batch_size)
    prompt_ids = policy.encode_prompts(tokenizer, [row.prompt for row in rows], prompt_template)
    plan, out = plan_images(LAYOUTS[layout], rows, num_images), Path(out)
    check_folder(out, layout, overwrite, share[1])
    size = batch_size or _fitting(policy, sampling, max(map(len, prompt_ids)))
    settings = {"layout": layout, "seed": seed, "num_images": num_images, "sampling": dataclasses.asdict(sampling)}
    settings |= {"prompt_template": prompt_template, "batch_size": size, **_origin(policy, model, rows)}
    if overwrite:
        _remove_former(out)
    begun = claim(side_folder(LAYOUTS[layout], out), settings, () if batch_size else ("batch_size",))
    images = GeneratedSet(out, LAYOUTS[layout], plan, begun)
    return Generated(out, *_fill(policy, prompt_ids, images, sampling, share), images.complete(_codebook(policy)))


def check_folder(out: Path, layout: str, overwrite: bool = False, num_processes: int = 1) -> None:
    """Refuse to write among files of another origin.

    Args:
        out: Folder to write.
        layout: A name in ``LAYOUTS``.
        overwrite: Whether a set that was begun there, in any layout, is to be deleted.
        num_processes: How many share the work.

    Raises:
        ValueError: If it is a file, holds something and is no generated set, or several processes would delete it.
    """
    if overwrite and num_processes > 1:
        raise ValueError(
            f"--overwrite with {num_processes} processes: one would delete what another writes; delete {out}"
        )
    if out.is_file():
        raise ValueError(f"out={str(out)!r} is a file; name a folder, which need not exist")
    foreign = out.is_dir() and any(".partial" not in path.name for path in out.iterdir())
    # Looked for last: another process may be creating the set right now.
    is_begun = (side_folder(LAYOUTS[layout], out) / GENERATION).is_file() or (overwrite and begun_layouts(out))
    if foreign and not is_begun:
        raise ValueError(f"out={str(out)!r} is not empty and no set in the making; choose another folder or remove it")


def _remove_former(out: Path) -> None:
    """Delete the set that was begun in a folder, if any, and rename its scores: nothing may take them for new ones."""
    if begun_layouts(out):
        set_scores_aside(out)
        remove_set(out)


def _fill(
    policy: ImagePolicy, prompt_ids: list[list[int]], images: GeneratedSet, sampling: Sampling, share: tuple[int, int]
) -> tuple[int, int]:
    """Make what is missing of this process's tiles; gives the numbers of images made and kept."""
    process, num_processes = share
    if process == 0:
        remove_leftovers(images.folder)
        remove_leftovers(images.side)
    size = images.settings["batch_size"]
    tiles = [images.plan[start : start + size] for start in range(0, len(images.plan), size)][process::num_processes]
    ours = [planned for tile in tiles for planned in tile]
    missing = images.lacking(ours, quiet=process != 0)
    if missing:
        images.reopen()
    kept = len(ours) - len(missing)
    name = "generate" if num_processes == 1 else f"generate, process {process} of {num_processes}"
    bar = tqdm(total=len(ours), initial=kept, unit="img", desc=name, bar_format=BAR_FORMAT, disable=process != 0)
    with bar, ThreadPoolExecutor() as pool:
        for tile in tiles:
            wanted = [(place, planned) for place, planned in enumerate(tile) if str(planned.path) in missing]
            if not wanted:
                continue
            keys = [(images.settings["seed"], planned.index, planned.sample) for planned in tile]
            codes, pictures = sample_tile(policy, [prompt_ids[planned.index] for planned in tile], keys, sampling)
            saved = [pool.submit(images.save, planned, pictures[place], codes[place]) for place, planned in wanted]
            for future in saved:
                future.result()
            images.describe_prompts(tile)
            bar.update(len(wanted))
    return len(missing), kept


def _check_numbers(rows: Sequence[PromptRow], num_images: int, seed: int, batch_size: int | None) -> None:
    if not rows:
        raise ValueError("there are no prompts to generate images for")
    if num_images < 1 or seed < 0 or (batch_size is not None and batch_size < 1):
        raise ValueError(
            f"num_images={num_images} and batch_size={batch_size} must be at least 1, and seed={seed} at least 0"
        )


def _origin(policy: ImagePolicy, model: str | Path | None, rows: Sequence[PromptRow]) -> dict[str, Any]:
    """What made the images, as far as it decides their bits."""
    return {
        "dtype": str(policy.get_output_embeddings().weight.dtype).removeprefix("torch."),
        "model": None if model is None else str(model),
        "checkpoint": None if model is None else checkpoint_sha256(model),
        "image_size": policy.image_size,
        "device": torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else "cpu",
        "versions": {name: version(name) for name in _PACKAGES},
        "prompts": _sha256_of_rows(rows),
    }


def _fitting(policy: ImagePolicy, sampling: Sampling, num_prompt_tokens: int) -> int:
    row_bytes = bytes_per_row(policy, num_prompt_tokens, sampling.guidance_scale != 1)
    return max(1, min(MAX_BATCH_SIZE, memory_budget(policy.device) // row_bytes))


def _sha256_of_rows(rows: Sequence[PromptRow]) -> str:
    lines = [json.dumps([row.prompt, row.metadata], sort_keys=True) + "\n" for row in rows]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _codebook(policy: ImagePolicy) -> bytes:
    """All code vectors as a safetensors file, so that images can be compared without the weights."""
    num_codes = policy.get_output_embeddings().weight.shape[0]
    codes = torch.arange(num_codes, device=policy.device)[None]
    return safetensors.torch.save({"codebook": policy.code_vectors(codes)[0].float().cpu().contiguous()})
