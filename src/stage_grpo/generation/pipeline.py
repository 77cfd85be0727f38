"""A checkpoint as one callable: prompts in, images out."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from stage_grpo.checkpoints.template import trained_template
from stage_grpo.generation.checkpoint_hash import glob_weights
from stage_grpo.generation.generate import BAR_FORMAT, MAX_BATCH_SIZE, sample_tile
from stage_grpo.policy import ImagePolicy, load_policy, load_tokenizer
from stage_grpo.policy.adapters import is_adapter
from stage_grpo.run_checkpoints import MANIFEST, newest_whole
from stage_grpo.sampling import Sampling

logger = logging.getLogger(__name__)

DEFAULT_GUIDANCE_SCALE = 5.0
"""Guidance of a checkpoint that names none."""


class ImagePipeline:
    """A policy with its tokenizer, called like the pipelines of diffusers.

    Image ``k`` of prompt ``i`` is drawn from the stream ``(seed, i, k)``, as by ``stage generate``.

    Attributes:
        policy: The policy.
        tokenizer: Its tokenizer.
        prompt_template: Text around a prompt, a name in ``PROMPT_TEMPLATES``.
    """

    def __init__(self, policy: ImagePolicy, tokenizer: Any, prompt_template: str = "janus"):
        self.policy = policy
        self.tokenizer = tokenizer
        self.prompt_template = prompt_template

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        prompt_template: str | None = None,
        base: str | Path | None = None,
    ) -> ImagePipeline:
        """Load a checkpoint.

        Args:
            model: Folder in transformers' or DeepSeek's format, folder of a LoRA adapter or of a run, or a hub name.
            dtype: Dtype of the weights; by default bfloat16 on a GPU and float32 on a CPU.
            device: Where to run.
            prompt_template: Text around a prompt; by default the one that the run was trained with, else "janus".
            base: Checkpoint that an adapter belongs to; by default the one that its config names.

        Raises:
            ValueError: If there is no whole checkpoint, or it cannot be used, see ``load_policy``.
        """
        model = find_checkpoint(model)
        dtype = dtype or ("bfloat16" if torch.device(device).type == "cuda" else "float32")
        policy = load_policy(model, dtype, base=base)
        tokenizer = load_tokenizer(policy)
        pipeline = cls(policy, tokenizer, prompt_template or trained_template(model) or "janus")
        return pipeline.to(device)

    def to(self, device: str | torch.device | torch.dtype) -> ImagePipeline:
        """Move the policy to a device, or to a dtype, and return the pipeline itself."""
        module: Any = self.policy
        module.to(device)
        return self

    @property
    def default_guidance_scale(self) -> float:
        """Guidance that is used unless told otherwise: the checkpoint's own, else 5."""
        own = self.policy.default_guidance_scale
        return DEFAULT_GUIDANCE_SCALE if own is None else own

    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        batch_size: int = MAX_BATCH_SIZE,
        progress: bool = False,
    ) -> list[Image.Image]:
        """Draw images.

        Args:
            prompt: One prompt or several.
            num_images: Images of each.
            seed: Seed of the random streams.
            guidance_scale: Classifier-free guidance; by default :attr:`default_guidance_scale`. 1 is none.
            temperature: Divides the guided logits.
            top_k: Keep the k most probable codes; 0 keeps all.
            top_p: Keep the likeliest codes of this share.
            min_p: Drop codes less probable than this share of the most probable one.
            batch_size: Images sampled at a time.
            progress: Whether to show a bar.

        Returns:
            RGB images, all of the first prompt, then all of the second, and so on.

        Raises:
            ValueError: If there is no prompt or an empty one, a number is out of range, or memory does not suffice.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or num_images < 1 or batch_size < 1 or seed < 0:
            raise ValueError(
                f"{len(prompts)} prompts, num_images={num_images} and batch_size={batch_size} must be at least 1, "
                f"and seed={seed} at least 0"
            )
        scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        sampling = Sampling(scale, temperature, top_k, top_p, min_p)
        prompt_ids = self.policy.encode_prompts(self.tokenizer, prompts, self.prompt_template)
        keys = [(seed, i, k) for i in range(len(prompts)) for k in range(num_images)]
        images: list[Image.Image] = []
        with tqdm(total=len(keys), unit="img", bar_format=BAR_FORMAT, disable=not progress) as bar:
            for start in range(0, len(keys), batch_size):
                tile = keys[start : start + batch_size]
                images += sample_tile(self.policy, [prompt_ids[i] for _, i, _ in tile], tile, sampling)[1]
                bar.update(len(tile))
        return images


def find_checkpoint(model: str | Path) -> str:
    """Where a model's weights are: the folder itself, or the newest whole checkpoint of a run that did not end.

    A run that ended and was continued since has final weights of its earlier end and newer checkpoints.

    Args:
        model: Folder or hub name.

    Returns:
        Folder or hub name for ``load_policy``.

    Raises:
        ValueError: If the folder is a run's and none of its checkpoints is whole.
    """
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    is_final = (folder / "config.json").is_file() or is_adapter(folder)
    if is_final and not any(_is_newer(path.parent, folder) for path in folder.glob(f"checkpoint-*/{MANIFEST}")):
        return str(model)
    newest, skipped = newest_whole(folder)
    if newest is None and skipped and not is_final:
        defects = "; ".join(f"{path.name} {defect}" for path, defect in skipped.items())
        raise ValueError(f"model={str(model)!r} holds no final weights and no whole checkpoint: {defects}; train on")
    for path, defect in skipped.items():
        logger.warning("%s %s; passed over", path, defect)
    if is_final:
        newest = newest if newest is not None and _is_newer(newest, folder) else None
        logger.warning(
            "%s was trained on after its final weights were written; drawing from %s", model, newest or model
        )
    return str(newest or model)


def _is_newer(checkpoint: Path, final: Path) -> bool:
    """Whether a checkpoint was sealed after final weights were written.

    By its own record and by the file's time: copying changes the one, and clocks of two machines differ in the other.
    """
    manifest = checkpoint / MANIFEST
    written_at = max((path.stat().st_mtime_ns for path in glob_weights(final)), default=0)
    try:
        sealed_at = int(json.loads(manifest.read_text(encoding="utf-8"))["written_at"])
        return min(sealed_at, manifest.stat().st_mtime_ns) > written_at
    except (OSError, ValueError, KeyError, TypeError):
        return False
