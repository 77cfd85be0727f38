"""Score a folder of images with rewards: the command ``stage score``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from stage_grpo.command_line import ArgumentParser
from stage_grpo.data import load_rows
from stage_grpo.images.folders import IMAGE_SUFFIXES, load_image, natural_order, read_prompt_folders
from stage_grpo.rewards.base import Reward, check_names
from stage_grpo.rewards.registry import build_reward
from stage_grpo.types import Metadata, PromptRow
from stage_grpo.weights.command import as_table


@dataclass(frozen=True)
class ImageSample:
    """One image on disk, and what it was made from."""

    path: Path
    prompt: str
    metadata: Metadata


@dataclass
class ScoreSummary:
    """What a reward gave to a whole folder.

    Attributes:
        scores: Scores so far, NaN for images that could not be scored.
        seconds: Time that the reward took, loading its model included.
    """

    scores: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def row(self, name: str) -> tuple[str, ...]:
        """Cells of the table: name, mean, standard deviation, least, greatest, failures, images a second."""
        scores = np.array(self.scores)
        scored = scores[~np.isnan(scores)]
        numbers = [scored.mean(), scored.std(), scored.min(), scored.max()] if len(scored) else [np.nan] * 4
        shown = ["-" if np.isnan(number) else f"{number:.4f}" for number in numbers]
        return (name, *shown, str(len(scores) - len(scored)), f"{len(scores) / max(self.seconds, 1e-9):.2f}")


_HEAD = ("reward", "mean", "std", "min", "max", "not scored", "images/s")


def read_samples(images_dir: Path, rows: Sequence[PromptRow] | None) -> list[ImageSample]:
    """Pair the images of a folder with their prompts. Nothing outside the folder is read, links included.

    Args:
        images_dir: Either numbered folders, one a prompt, as ``stage generate`` writes them; or image files, which are
            taken in the order of their names, numbers in them as numbers: ``2.png`` before ``10.png``.
        rows: The prompts. Numbered folders name their own, so they may do without; else the i-th prompt is that of
            the i-th folder, or the images are shared out evenly, the first ones to the first prompt.

    Raises:
        ValueError: No such folder, nothing in it, unreadable images, a link that leads outside, numbers of images
            and prompts that do not fit, or folders that were made from other prompts.
    """
    if not images_dir.is_dir():
        raise ValueError(f"{images_dir} is not a folder; generate images first, or correct the path")
    _check_links(images_dir)
    if any(path.is_dir() and path.name.isdigit() for path in images_dir.iterdir()):
        return _from_prompt_folders(images_dir, rows)
    files = [path for path in images_dir.iterdir() if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES]
    paths = sorted(files, key=natural_order)
    if not paths:
        raise ValueError(f"{images_dir} holds no image ({', '.join(IMAGE_SUFFIXES)}) and no numbered folder")
    if rows is None:
        raise ValueError(f"the images of {images_dir} do not say what they were made from; give --prompts FILE")
    if len(paths) % len(rows):
        raise ValueError(f"{images_dir} holds {len(paths)} images, which {len(rows)} prompts do not share out evenly")
    for path in paths:
        load_image(path)  # a torn file shows here and not after an hour of scoring
    each = len(paths) // len(rows)
    return [ImageSample(path, *rows[index // each]) for index, path in enumerate(paths)]


def _from_prompt_folders(images_dir: Path, rows: Sequence[PromptRow] | None) -> list[ImageSample]:
    folders = read_prompt_folders(images_dir)
    if rows is not None and len(rows) != len(folders):
        raise ValueError(f"{images_dir} holds {len(folders)} prompts, but --prompts {len(rows)}; leave --prompts out")
    for folder, row in zip(folders, rows or ()):
        said = folder.metadata["prompt"].strip()
        if said != row.prompt:
            where = f"{images_dir / folder.name} was made from {said!r}, but --prompts has {row.prompt!r} there"
            raise ValueError(f"{where}; give the prompts that the images were made from, or leave --prompts out")
    described = rows or [PromptRow(folder.metadata["prompt"], folder.metadata) for folder in folders]
    return [ImageSample(path, *row) for folder, row in zip(folders, described) for path in folder.images]


def _check_links(images_dir: Path) -> None:
    root = images_dir.resolve()
    for folder, folders, files in os.walk(images_dir):
        for name in [*folders, *files]:
            path = Path(folder, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise ValueError(f"{path} is a link to {path.resolve()}, outside the folder; copy the file instead")


def score_samples(
    rewards: Sequence[Reward], samples: Sequence[ImageSample], batch_size: int = 64
) -> Iterator[tuple[ImageSample, dict[str, float], dict[str, dict[str, Any]], dict[str, float]]]:
    """Score images batch by batch.

    Args:
        rewards: Rewards.
        samples: Images.
        batch_size: Images read at a time; a reward may cut them into smaller batches of its own.

    Yields:
        For every sample: itself, its score by reward (NaN where it has none), its details by reward, and the seconds
        that each reward took for it.
    """
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        images: list[Image.Image] = [load_image(sample.path) for sample in batch]
        results, seconds = [], {}
        for reward in rewards:
            begun = time.perf_counter()
            results.append(
                reward.score(images, [sample.prompt for sample in batch], [sample.metadata for sample in batch])
            )
            seconds[reward.name] = (time.perf_counter() - begun) / len(batch)
        for index, sample in enumerate(batch):
            scores = {reward.name: float(result.scores[index]) for reward, result in zip(rewards, results)}
            details = {
                reward.name: {name: values[index] for name, values in result.details.items()}
                for reward, result in zip(rewards, results)
            }
            yield sample, scores, details, seconds


def score_folder(
    rewards: Sequence[Reward], samples: Sequence[ImageSample], images_dir: Path, out: Path, batch_size: int = 64
) -> dict[str, ScoreSummary]:
    """Score images into a file of JSON lines: path within the folder, prompt, scores (null for none), details.

    The file appears when it is whole; nothing is left of one that is not.

    Raises:
        OSError: The file cannot be written.
        ValueError: A reward returned what it should not.
    """
    summaries = {reward.name: ScoreSummary() for reward in rewards}
    partial = out.with_name(f".{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("w", encoding="utf-8") as sink, tqdm(total=len(samples), unit="image", disable=None) as bar:
            for sample, scores, details, seconds in score_samples(rewards, samples, batch_size):
                _write(sink, sample.path.relative_to(images_dir), sample.prompt, scores, details)
                for name, summary in summaries.items():
                    summary.scores.append(scores[name])
                    summary.seconds += seconds[name]
                bar.update()
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return summaries


def _write(
    sink: IO[str], path: Path, prompt: str, scores: dict[str, float], details: dict[str, dict[str, Any]]
) -> None:
    line = {
        "path": path.as_posix(),
        "prompt": prompt,
        "scores": {name: None if np.isnan(score) else score for name, score in scores.items()},
        "details": details,
    }
    sink.write(json.dumps(line, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def main_score(program: str, words: Sequence[str]) -> str:
    """Run ``stage score --reward NAME[,NAME...] --images DIR --prompts FILE --out FILE``.

    Returns:
        A table: one line a reward.

    Raises:
        ValueError: A wrong word or value, unknown rewards, or images and prompts that do not fit.
        OSError: The file cannot be written.
    """
    parser = ArgumentParser(prog=program, description="Score a folder of images with rewards.")
    parser.add_argument("--reward", required=True, metavar="NAME[,NAME...]", help="see stage rewards")
    parser.add_argument("--images", required=True, metavar="DIR", help="numbered folders, or image files")
    parser.add_argument("--prompts", metavar="FILE", help="prompts of the images: .txt, .jsonl or .csv")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write, .jsonl: one line an image")
    parser.add_argument(
        "--options", default="{}", metavar="JSON", help='by reward, e.g. \'{"hps": {"batch_size": 8}}\''
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images read at a time (64)")
    options = parser.parse_args(list(words))

    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size} must be at least 1")
    images_dir, out = Path(options.images).expanduser(), Path(options.out).expanduser()
    if out.is_dir():
        raise ValueError(f"--out {options.out} is a folder; name a file in it, e.g. {out / 'scores.jsonl'}")
    names = [name for part in options.reward.split(",") if (name := part.strip())]
    by_name = parse_options(options.options, names)
    rewards = [build_reward(name, by_name.get(name)) for name in names]
    check_names(rewards)
    samples = read_samples(images_dir, load_rows(options.prompts) if options.prompts else None)
    summaries = score_folder(rewards, samples, images_dir, out, options.batch_size)
    table = as_table([_HEAD, *(summary.row(name) for name, summary in summaries.items())])
    return "\n".join([*table, f"wrote {len(samples)} lines to {out}"])


def parse_options(text: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read options by reward name from JSON.

    Raises:
        ValueError: No JSON, or options of a reward that is not named.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--reward names {', '.join(names) or 'nothing'}; name each reward once, joined by commas")
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--options {text!r} is no JSON ({error}); write {{NAME: {{OPTION: VALUE}}}}") from None
    if not isinstance(options, dict) or not all(isinstance(value, dict) for value in options.values()):
        raise ValueError(f'--options {text} must be {{NAME: {{OPTION: VALUE}}}}, e.g. {{"{names[0]}": {{}}}}')
    for name in options:
        if name not in names:
            raise ValueError(f"--options names {name!r}, which is not among --reward {','.join(names)}")
    return options
