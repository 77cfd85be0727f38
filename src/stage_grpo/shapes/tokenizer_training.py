"""Training of the tiny policy's image tokenizer, a `transformers` `JanusVQVAE`, on rendered scenes.

The library's own `forward` decodes from indices, so no gradient reaches its encoder; the loop here is the usual
straight-through one. Codebook rows are kept at unit norm because `decode` normalises them and `encode` does not:
with unit rows both choose and show the same code.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers.models.janus.modeling_janus import JanusVQVAE

from stage_grpo.shapes.pretrain_config import PretrainConfig
from stage_grpo.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    render,
    sample_centers,
)
from stage_grpo.shapes.training_state import learning_rate_factor, load_state, save_state

_WARMUP = 30
_PLATEAU = 0.4
_REVIVE_UNTIL = 0.6
"""Share of the run after which idle codes stay idle, so that the others can settle."""
_STREAM = 1
"""Tells this stage's random numbers from the policy's."""
_FOREGROUND = 0.08
"""Distance from the background, in the model's [-1, 1] units, from which a pixel counts as part of a shape."""


@dataclass(frozen=True)
class CodebookSettings:
    """How codebook rows follow the encoder.

    Attributes:
        decay: of the moving averages of each row's count and sum, in [0, 1).
        revive_below: rows used by fewer vectors a step than this, on average, are replaced by encoder outputs.
        commitment: weight of the pull of encoder outputs towards their codes.
    """

    decay: float = 0.95
    revive_below: float = 0.02
    commitment: float = 0.25


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene for the tokenizer: 2 to 4 shapes, everything random, so that each step shows many codes."""
    sizes = [str(name) for name in rng.choice(list(SIZES), rng.integers(2, MAX_OBJECTS + 1))]
    objects = [
        SceneObject(str(rng.choice(SHAPES)), str(rng.choice(list(COLORS))), size, x, y)
        for size, (x, y) in zip(sizes, sample_centers(rng, sizes))
    ]
    return Scene(tuple(objects), int(rng.integers(BACKGROUNDS[0], BACKGROUNDS[1] + 1)))


def to_pixels(scenes: list[Scene]) -> Float[Tensor, "batch 3 height width"]:
    """Render scenes as the model's input: float32 in [-1, 1], channels first."""
    pixels = np.stack([np.asarray(render(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def initialize(vqmodel: JanusVQVAE, generator: torch.Generator) -> None:
    """Give convolutions a variance-preserving start: the library's normal(0.02) hardly trains at this width."""
    for module in vqmodel.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
            nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
    rows = torch.randn(vqmodel.quantize.embedding.weight.shape, generator=generator)
    vqmodel.quantize.embedding.weight.data.copy_(F.normalize(rows, dim=-1))
    vqmodel.quantize.embedding.weight.requires_grad_(False)


class Codebook:
    """Moving averages behind the unit-norm codebook rows of one `JanusVQVAE`."""

    def __init__(self, vqmodel: JanusVQVAE, settings: CodebookSettings) -> None:
        self.rows = vqmodel.quantize.embedding.weight
        self.settings = settings
        self.counts = torch.ones(len(self.rows))
        self.sums = self.rows.detach().clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to store in a checkpoint."""
        return {"counts": self.counts, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self.counts, self.sums = state["counts"].clone(), state["sums"].clone()

    def nearest(self, vectors: Float[Tensor, "num D"]) -> Int[Tensor, " num"]:
        """Index of the code nearest to each unit vector."""
        return (vectors @ self.rows.T).argmax(-1)

    @torch.no_grad()
    def update(
        self,
        vectors: Float[Tensor, "num D"],
        codes: Int[Tensor, " num"],
        generator: torch.Generator,
        revive: bool = True,
    ) -> None:
        """Move rows towards the mean of the vectors they stand for; `revive` also reuses rows that lie idle."""
        decay = self.settings.decay
        counts = torch.bincount(codes, minlength=len(self.rows)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
        self.counts.mul_(decay).add_(counts, alpha=1 - decay)
        self.sums.mul_(decay).add_(sums, alpha=1 - decay)
        dead = (self.counts < self.settings.revive_below).nonzero().squeeze(-1)
        if revive and len(dead):
            # Vectors far from their code are what the codebook lacks.
            error = 1 - (vectors * self.rows[codes]).sum(-1)
            chosen = torch.multinomial(error + 1e-6, min(len(dead), len(vectors)), generator=generator)
            dead = dead[: len(chosen)]
            self.counts[dead] = 1.0
            self.sums[dead] = vectors[chosen]
        self.rows.data.copy_(F.normalize(self.sums, dim=-1))


def tokenizer_loss(
    vqmodel: JanusVQVAE, codebook: Codebook, pixels: Float[Tensor, "batch 3 height width"], foreground: float
) -> tuple[Float[Tensor, ""], Float[Tensor, "num D"], Int[Tensor, " num"]]:
    """Reconstruction and commitment loss of one batch, with a straight-through gradient.

    Args:
        vqmodel: the tokenizer.
        codebook: its codebook.
        pixels: pictures in [-1, 1].
        foreground: weight of pixels on and next to shapes, against 1 for the background.

    Returns:
        The loss, and the unit encoder vectors with their codes, for `Codebook.update`.
    """
    latent = vqmodel.quant_conv(vqmodel.encoder(pixels))
    vectors = F.normalize(latent.permute(0, 2, 3, 1), dim=-1)
    flat = vectors.reshape(-1, vectors.shape[-1])
    codes = codebook.nearest(flat.detach())
    quantized = F.embedding(codes, codebook.rows).view_as(vectors)
    commitment = F.mse_loss(vectors, quantized.detach())
    through = (vectors + (quantized - vectors).detach()).permute(0, 3, 1, 2).contiguous()
    decoded = vqmodel.decoder(vqmodel.post_quant_conv(through))
    weight = foreground_weight(pixels, foreground)
    error = (decoded - pixels).abs() + (decoded - pixels).square()
    loss = (weight * error).sum() / (weight.sum() * pixels.shape[1])
    return loss + codebook.settings.commitment * commitment, flat.detach(), codes


def foreground_weight(
    pixels: Float[Tensor, "batch 3 height width"], foreground: float, margin: int = 1
) -> Float[Tensor, "batch 1 height width"]:
    """Per-pixel loss weights: `foreground` on shapes and `margin` pixels around them, 1 elsewhere."""
    background = pixels.amax(1).flatten(1).median(-1).values[:, None, None, None]
    shape = ((pixels - background).abs().amax(1, keepdim=True) > _FOREGROUND).float()
    return 1.0 + (foreground - 1.0) * F.max_pool2d(shape, 2 * margin + 1, stride=1, padding=margin)


@torch.no_grad()
def encode(vqmodel: Any, pixels: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, "batch T"]:
    """Image codes of pictures in [-1, 1], in reading order."""
    return vqmodel.encode(pixels, return_dict=True).image_tokens.view(len(pixels), -1)


def train_tokenizer(vqmodel: JanusVQVAE, config: PretrainConfig, folder: Path) -> float:
    """Train an image tokenizer in place, resuming from `folder` where an earlier run left off.

    Each step's pictures depend on the seed and the step alone, so an interrupted run ends as an undisturbed one.

    Returns:
        Seconds spent training, in all runs together.

    Raises:
        ValueError: an unreadable checkpoint.
    """
    generator = torch.Generator().manual_seed(config.seed)
    initialize(vqmodel, generator)
    codebook = Codebook(vqmodel, CodebookSettings())
    parameters = [p for p in vqmodel.parameters() if p is not codebook.rows]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=config.tokenizer_lr, betas=(0.9, 0.99), weight_decay=0.0)
    start, seconds, saved = 0, 0.0, load_state(folder)
    if saved is not None:
        tensors, state = saved
        vqmodel.load_state_dict(tensors)
        codebook.load_state_dict(state["codebook"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        start, seconds = state["step"], state["seconds"]
    began = time.monotonic() - seconds
    progress = tqdm(range(start, config.tokenizer_steps), "tokenizer", initial=start, total=config.tokenizer_steps)
    for step in progress:
        factor = learning_rate_factor(step, config.tokenizer_steps, _WARMUP, _PLATEAU)
        for group in optimizer.param_groups:
            group["lr"] = config.tokenizer_lr * factor
        rng = np.random.default_rng((config.seed, _STREAM, step))
        pixels = to_pixels([random_scene(rng) for _ in range(config.tokenizer_batch_size)])
        loss, vectors, codes = tokenizer_loss(vqmodel, codebook, pixels, config.tokenizer_foreground)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        codebook.update(vectors, codes, generator, revive=step < _REVIVE_UNTIL * config.tokenizer_steps)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % config.save_every == 0 or step + 1 == config.tokenizer_steps:
            seconds = time.monotonic() - began
            state = {"step": step + 1, "seconds": seconds, "optimizer": optimizer.state_dict()}
            state |= {"generator": generator.get_state(), "codebook": codebook.state_dict()}
            save_state(folder, vqmodel.state_dict(), state)
    return seconds
