"""Writing images for prompts: the rollout engine, a folder layout, a progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from stage_grpo.image_folders import write_prompt_folder
from stage_grpo.policy.base import ImagePolicy
from stage_grpo.rollout import bytes_per_row, decode_images, memory_budget, rollout
from stage_grpo.sampling import Sampling, image_uniforms
from stage_grpo.types import PromptRow


def sample(
    policy: ImagePolicy,
    tokenizer: Any,
    prompts: Sequence[str],
    keys: Sequence[tuple[int, ...]],
    sampling: Sampling,
    prompt_template: str = "janus",
) -> list[Image.Image]:
    """Sample one RGB image a prompt.

    Args:
        policy: The policy.
        tokenizer: Its tokenizer.
        prompts: One an image; equal neighbours share their prefix.
        keys: Name of each image's random stream, see :func:`~stage_grpo.sampling.image_uniforms`.
        sampling: Guidance, temperature and truncation.
        prompt_template: A name in ``PROMPT_TEMPLATES``.
    """
    prompt_ids = policy.encode_prompts(tokenizer, prompts, prompt_template)
    uniforms = image_uniforms(keys, policy.num_image_tokens)
    codes = rollout(policy, prompt_ids, uniforms, sampling).codes
    return [Image.fromarray(pixels) for pixels in decode_images(policy, codes)]


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
) -> Path:
    """Generate images of prompts into a folder in GenEval's layout (see ``stage_grpo.image_folders``).

    Image ``k`` of prompt ``i`` is drawn from the stream ``(seed, i, k)``, whatever the batch size.

    Args:
        policy: The policy.
        tokenizer: Its tokenizer.
        rows: Prompts with their metadata.
        out: Folder to write; must not exist or be empty.
        sampling: Guidance, temperature and truncation.
        num_images: Images of each prompt.
        seed: Seed of the run.
        batch_size: Images sampled at a time; by default what the memory budget allows, at most 256.
        prompt_template: A name in ``PROMPT_TEMPLATES``.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder is not empty, a prompt is empty or there are none, or a number is out of range.
    """
    out = Path(out)
    policy.encode_prompts(tokenizer, [row.prompt for row in rows], prompt_template)  # wrong prompts end here
    _check_job(rows, out, num_images, seed, batch_size)
    jobs = [(i, k) for i in range(len(rows)) for k in range(num_images)]
    batch_size = batch_size or _fitting_batch(policy, sampling)
    pending: dict[int, list[Image.Image]] = {}
    with tqdm(total=len(jobs), unit="img", desc="generate") as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            prompts, keys = [rows[i].prompt for i, _ in batch], [(seed, i, k) for i, k in batch]
            images = sample(policy, tokenizer, prompts, keys, sampling, prompt_template)
            for (i, k), image in zip(batch, images):
                pending.setdefault(i, []).append(image)
                if k == num_images - 1:
                    write_prompt_folder(out, i, {**rows[i].metadata, "prompt": rows[i].prompt}, pending.pop(i))
            bar.update(len(batch))
    return out


def _check_job(rows: Sequence[PromptRow], out: Path, num_images: int, seed: int, batch_size: int | None) -> None:
    if not rows:
        raise ValueError("there are no prompts to generate images for")
    if num_images < 1 or seed < 0 or (batch_size is not None and batch_size < 1):
        raise ValueError(
            f"num_images={num_images} and batch_size={batch_size} must be at least 1, and seed={seed} at least 0"
        )
    if out.is_file():
        raise ValueError(f"out={str(out)!r} is a file; name a folder, which need not exist")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out={str(out)!r} is not empty; choose another folder or remove it")


def _fitting_batch(policy: ImagePolicy, sampling: Sampling) -> int:
    """Images whose rollout fits the memory budget; prompts are taken to have 128 tokens."""
    row_bytes = bytes_per_row(policy, 128, sampling.guidance_scale != 1)
    return max(1, min(256, memory_budget(policy.device) // row_bytes))
