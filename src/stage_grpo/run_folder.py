"""What a run leaves behind: ``run.json``, ``metrics.jsonl``, ``samples/``, and the callbacks that write them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import ProgressCallback

from stage_grpo.run_record import ABANDONED
from stage_grpo.versions import package_versions

MAX_SAMPLES = 32
"""Images of one saved grid."""
RECORDS, STEPS, BEST = "heldout.jsonl", "heldout", "best"
"""What held-out evaluations leave: all scores; the folder with one folder a step; the best policy."""

_PACKAGES = ("stage-grpo", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy", "pillow")
"""They decide numbers."""


@dataclass
class StepSamples:
    """Images of one rollout on this process, with what became of them.

    Attributes:
        prompts: One an image, groups contiguous.
        images: RGB.
        rewards: Total rewards; NaN where none could score.
        advantages: Mean over the image's tokens of what the loss uses.
        grid: Rows and columns of image tokens.
        weights: Advantage weights M of each image's tokens, row by row, if advantages are reweighted.
        num_generations: Images of one prompt.
    """

    prompts: list[str]
    images: list[Image.Image]
    rewards: list[float]
    advantages: list[float]
    grid: tuple[int, int]
    weights: list[list[float]] | None
    num_generations: int


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def source_commit() -> str | None:
    """Commit of the source tree, if the package runs from one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory_mb() -> float:
    """Peak memory of this process in MB: of the GPU where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / 1e6 if sys.platform == "darwin" else resident * 1024 / 1e6


def image_grid(images: list[Image.Image], columns: int) -> Image.Image:
    """Put equal-sized images side by side, row by row, at their own size."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def labelled_grid(samples: StepSamples) -> Image.Image:
    """Draw each group as a row under its prompt, with every image's reward below it."""
    columns, tile, line = samples.num_generations, max(96, samples.images[0].width), 18
    font = ImageFont.load_default(size=12)
    num_rows = -(-len(samples.images) // columns)
    sheet = Image.new("RGB", (columns * (tile + 6) + 6, num_rows * (tile + 2 * line + 8)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(samples.images):
        x, y = 6 + i % columns * (tile + 6), i // columns * (tile + 2 * line + 8)
        if i % columns == 0:
            draw.text((x, y + 3), samples.prompts[i], fill="black", font=font)
        sheet.paste(image.resize((tile, tile), Image.Resampling.NEAREST), (x, y + line))
        draw.text((x, y + line + tile + 2), f"{samples.rewards[i]:.3f}", fill="dimgray", font=font)
    return sheet


class RunFolder:
    """The output folder of a run. Nothing is created before the first write.

    Attributes:
        path: The folder.
        is_resumed: Whether the training under way goes on from a checkpoint, be it that of step 0.
        samples: The last rollout.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.is_resumed = False
        self.samples: StepSamples | None = None

    def write_run(self, config: dict[str, Any], seed: int) -> None:
        """Write ``run.json``: resolved config, versions, seed and the commit of the source, if any."""
        self.path.mkdir(parents=True, exist_ok=True)
        run = {"config": config, "seed": seed, "versions": package_versions(_PACKAGES), "commit": source_commit()}
        write_atomically(self.path / "run.json", json.dumps(run, indent=2) + "\n")

    def start_metrics(self, step: int) -> None:
        """Begin ``metrics.jsonl`` and ``samples/``; when a run resumes at a step, what is beyond it is dropped.

        Rows that a rollback took back stay.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / "metrics.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines() if self.is_resumed and path.exists() else []
        kept = [row for row in rows if (known := _row(row)) and (known["step"] <= step or ABANDONED in known)]
        write_atomically(path, "".join(f"{row}\n" for row in kept))
        for picture in (self.path / "samples").glob("step_*"):
            number = picture.stem.split("_")[1]
            if number.isdigit() and not (self.is_resumed and int(number) <= step):
                picture.unlink()

    def forget_heldout(self, used: Sequence[str]) -> None:
        """Remove held-out scores and the best policy of an earlier run of this folder.

        Args:
            used: Models that the run under way reads; its best policy stays if it is one of them.
        """
        (self.path / RECORDS).unlink(missing_ok=True)
        shutil.rmtree(self.path / STEPS, ignore_errors=True)
        if (self.path / BEST).resolve() not in [Path(model).resolve() for model in used]:
            shutil.rmtree(self.path / BEST, ignore_errors=True)

    def abandon_metrics(self, step: int, number: int) -> None:
        """Mark the rows beyond a step, to which a run goes back, as abandoned.

        Args:
            step: Optimizer steps.
            number: Which rollback it is, from 1.
        """
        path = self.path / "metrics.jsonl"
        rows = [known for row in path.read_text(encoding="utf-8").splitlines() if (known := _row(row))]
        marked = [{ABANDONED: number, **row} if row["step"] > step else row for row in rows]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in marked))

    def append_metrics(self, step: int, logs: dict[str, Any]) -> None:
        """Append one row to ``metrics.jsonl``; numbers that are not finite become null."""
        row = {"step": step, **{name: _finite(value) for name, value in logs.items()}}
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save_samples(self, step: int) -> Image.Image | None:
        """Save the last rollout's first groups as ``samples/step_*.png``, labelled twin and ``.json``.

        Returns:
            The labelled grid, for trackers; None before the first rollout.
        """
        samples = self.samples
        if samples is None:
            return None
        groups = max(1, min(MAX_SAMPLES, len(samples.images)) // samples.num_generations)
        kept = slice(0, groups * samples.num_generations)
        samples = StepSamples(
            samples.prompts[kept],
            samples.images[kept],
            samples.rewards[kept],
            samples.advantages[kept],
            samples.grid,
            samples.weights[kept] if samples.weights else None,
            samples.num_generations,
        )
        folder = self.path / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"step_{step:06d}"
        image_grid(samples.images, samples.num_generations).save(folder / f"{stem}.png")
        labelled = labelled_grid(samples)
        labelled.save(folder / f"{stem}_labelled.png")
        record = {
            "step": step,
            "columns": samples.num_generations,
            "tile": samples.images[0].width,
            "grid": list(samples.grid),
            "prompts": samples.prompts,
            "rewards": [_finite(value) for value in samples.rewards],
            "advantages": samples.advantages,
            "weights": samples.weights,
        }
        write_atomically(folder / f"{stem}.json", json.dumps(record))
        return labelled


class RunFolderCallback(TrainerCallback):
    """Fills the run folder while TRL trains, and shows sample grids to the trackers of ``report_to``."""

    def __init__(self, folder: RunFolder, config: Any, trackers: Any):
        self.folder = folder
        self.config = config
        self.trackers = trackers

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write ``run.json``, open ``metrics.jsonl`` and remove what an earlier run left."""
        if state.is_world_process_zero:
            self.folder.write_run(self.config.to_json(), args.seed)
            self.folder.start_metrics(state.global_step)
            if not self.folder.is_resumed:
                self.folder.forget_heldout([model for model in (self.config.model, self.config.ref_model) if model])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append the row that goes to all trackers."""
        if state.is_world_process_zero:
            self.folder.append_metrics(state.global_step, logs or {})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save a grid at the first step and every ``sample_steps`` steps."""
        every = self.config.sample_steps
        if state.is_world_process_zero and every and (state.global_step == 1 or state.global_step % every == 0):
            grid = self.folder.save_samples(state.global_step)
            if grid is not None:
                publish_image(self.trackers.callbacks, "samples", grid, state.global_step)


def publish_image(callbacks: list[Any], name: str, image: Image.Image, step: int) -> None:
    """Send an image to the trackers among a trainer's callbacks (TensorBoard and wandb)."""
    for callback in callbacks:
        writer = getattr(callback, "tb_writer", None)
        if isinstance(callback, TensorBoardCallback) and writer is not None:
            writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        if isinstance(callback, WandbCallback):
            import wandb

            if wandb.run is not None:
                wandb.log({name: wandb.Image(image), "train/global_step": step})


class StepProgress(ProgressCallback):
    """The progress bar of transformers, with the numbers to watch beside it instead of every metric printed."""

    SHOWN = ("reward", "kl", "entropy/gap", "seconds/rollout", "seconds/update")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show a few numbers at the end of the bar."""
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {name: logs[name] for name in self.SHOWN if (logs or {}).get(name) is not None}
            if shown:
                self.training_bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})


def _row(line: str) -> dict[str, Any] | None:
    """A row of ``metrics.jsonl``, None if it was torn by a crash."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
