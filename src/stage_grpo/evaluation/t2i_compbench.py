"""T2I-CompBench on a folder of images: its own rewards where they serve, its official code where only that does.

::

    ROOT/color_val/samples/a green bench and a blue bowl_000000.png     prompt, and a number

    OUT/color.json                what :func:`run_official` found: one score an image
    OUT/official/color_val/       where the official code ran: links to the images, its results, its output

Images may be numbered through the category, as the benchmark's own generator does, or within each prompt. The official
code sorts by that number alone; here it is shown links that are numbered through, so that it cannot mix prompts up.

Source: arXiv:2307.06350, github.com/Karine-Huang/T2I-CompBench.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stage_grpo.command_line import ArgumentParser
from stage_grpo.evaluation.official_t2i_compbench import (
    CATEGORIES,
    IMAGES_PER_PROMPT,
    category_run,
    check_checkout,
    find_python,
)
from stage_grpo.images.folders import load_image

_NAME = re.compile(r"(?P<prompt>[^_]+)_(?P<number>\d+)\.png")
_CHUNK = 64
"""Images that are opened at a time."""

REWARDS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "color": ("blip_vqa", {"legacy": True}),
        "shape": ("blip_vqa", {"legacy": True}),
        "texture": ("blip_vqa", {"legacy": True}),
        "non_spatial": ("clip", {"weights": "clip-vit-base-patch32"}),
    }
)
"""Categories whose official score a reward of this package computes, with its options."""


def prompt_of(path: Path) -> str:
    """The prompt that an image's name holds.

    Raises:
        ValueError: The name is not ``<prompt>_<number>.png``, or the prompt has an underscore.
    """
    return _parts(path)["prompt"]


def official_order(paths: Sequence[Path]) -> list[Path]:
    """Images in the order that the official code takes them: by the number in their name.

    Where prompts share a number, which the official code leaves to the file system, they go by name.

    Raises:
        ValueError: A name is not ``<prompt>_<number>.png``, or its prompt has an underscore, before which the official
            code would cut it off.
    """
    return sorted(paths, key=lambda path: (int(_parts(path)["number"]), path.name))


def images_of(images_dir: Path, category: str) -> list[Path]:
    """The images of a category, in :func:`official_order`.

    Args:
        images_dir: Folder of all categories.
        category: One of ``CATEGORIES``.

    Raises:
        ValueError: An unknown category, no images, or names that are not the benchmark's.
    """
    if category not in CATEGORIES:
        raise ValueError(f"T2I-CompBench has no category {category!r}; choose from {', '.join(CATEGORIES)}")
    samples = Path(images_dir) / f"{category}_val" / "samples"
    # Hidden files are the leftovers of other programs, at which the official code would fail.
    paths = [path for path in samples.iterdir() if not path.name.startswith(".")] if samples.is_dir() else []
    if not paths:
        raise ValueError(f"{samples} holds no images; generate the category {category!r}, or leave it out")
    return official_order(paths)


def in_prompt_order(paths: Sequence[Path], prompts: Sequence[str]) -> list[Path]:
    """Images ten by ten in the order of the prompts, as the official 3-in-1 score takes for granted.

    Args:
        paths: Images in :func:`official_order`.
        prompts: Lines of the official prompt file.

    Raises:
        ValueError: A prompt has not ten images, or an image no prompt.
    """
    by_prompt: dict[str, list[Path]] = {}
    for path in paths:
        by_prompt.setdefault(_as_compared(prompt_of(path)), []).append(path)
    ordered = []
    for prompt in prompts:
        images = by_prompt.get(_as_compared(prompt), [])
        if len(images) < IMAGES_PER_PROMPT:
            raise ValueError(
                f"prompt {prompt!r} has {len(images)} images, but the official 3-in-1 score takes "
                f"{IMAGES_PER_PROMPT} of each prompt for granted; generate the rest"
            )
        ordered += images[:IMAGES_PER_PROMPT]
        del images[:IMAGES_PER_PROMPT]
    spare = next((path for images in by_prompt.values() for path in images), None)
    if spare is not None:
        raise ValueError(f"{spare} is one too many for the official 3-in-1 score (10 of each prompt); move it away")
    return ordered


def run_official(
    images_dir: Path, official_root: Path, python: str, out_dir: Path, categories: Sequence[str] = CATEGORIES
) -> dict[str, list[float | None]]:
    """Scores categories by the benchmark's own code. A category whose result is there already is not run again.

    Args:
        images_dir: Folder of all categories.
        official_root: A checkout of the official code.
        python: The interpreter of its environment, a path or a command.
        out_dir: Where results go, ``<category>.json``; made if needed. The images' own folder is only read.
        categories: Some of ``CATEGORIES``.

    Returns:
        Of each category one score an image, in :func:`official_order`; None where the official code gives no number.

    Raises:
        ValueError: Images, checkout or interpreter are not there or not usable, a script failed, or it scored another
            number of images than there are.
    """
    images = {category: images_of(images_dir, category) for category in categories}
    root, out = Path(official_root).expanduser().absolute(), Path(out_dir).expanduser().absolute()
    check_checkout(root, categories)
    interpreter = find_python(python)
    shown = dict(images)
    if "complex" in shown:
        lines = (root / "examples/dataset/complex_val.txt").read_text(encoding="utf-8").splitlines()
        shown["complex"] = in_prompt_order(images["complex"], lines)
    scores = {}
    for category, paths in shown.items():
        named = [(f"{prompt_of(path)}_{place:06d}.png", path.absolute()) for place, path in enumerate(paths)]
        found = dict(zip(paths, category_run(category, named, root, interpreter, out), strict=True))
        scores[category] = [found[path] for path in images[category]]
    return scores


def category_scores(
    images_dir: Path,
    category: str,
    official_root: Path | None = None,
    python: str = "python",
    out_dir: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[Path, float | None]:
    """The score of every image of a category.

    Args:
        images_dir: Folder of all categories.
        category: One of ``CATEGORIES``.
        official_root: A checkout of the official code, which then scores; None: a reward of this package does.
        python: The interpreter of the checkout's environment.
        out_dir: Where the official results go, by default ``t2i_compbench`` within ``images_dir``.
        options: Further options of the reward, such as ``device``.

    Returns:
        Scores by image in :func:`official_order`, in the benchmark's unit; None where there is none.

    Raises:
        ValueError: The category needs the official code and none is given, or as :func:`run_official` and the reward.
    """
    paths = images_of(images_dir, category)
    if official_root is not None:
        out = Path(images_dir) / "t2i_compbench" if out_dir is None else out_dir
        return dict(zip(paths, run_official(images_dir, official_root, python, out, [category])[category]))
    if category not in REWARDS:
        raise ValueError(
            f"category {category!r} is scored by the official code alone; get github.com/Karine-Huang/T2I-CompBench "
            "and set T2I_COMPBENCH_ROOT to it (docs/t2i_compbench.md)"
        )
    from stage_grpo.rewards.registry import build_reward

    name, own = REWARDS[category]
    reward = build_reward(name, {**own, **(options or {})})
    scores: list[float] = []
    for start in range(0, len(paths), _CHUNK):
        chunk = paths[start : start + _CHUNK]
        scores += reward.score(
            [load_image(path) for path in chunk], [prompt_of(path) for path in chunk]
        ).scores.tolist()
    return {path: None if math.isnan(score) else score for path, score in zip(paths, scores)}


def main_official(program: str, words: Sequence[str]) -> str:
    """Score a folder by the official code: ``ROOT --official-root CHECKOUT [--python PYTHON] [--out DIR]``.

    Returns:
        A line for each category: name, mean over the images that have a score, number of images.

    Raises:
        ValueError: A wrong word, or as :func:`run_official`.
    """
    parser = ArgumentParser(prog=program, description="Score images by T2I-CompBench's own code.")
    parser.add_argument("images", metavar="ROOT", help="holds <category>_val/samples/<prompt>_<number>.png")
    parser.add_argument("--official-root", required=True, help="checkout of github.com/Karine-Huang/T2I-CompBench")
    parser.add_argument("--python", default="python", help="interpreter of its environment (default: python)")
    parser.add_argument("--out", help="where results go (default: ROOT/t2i_compbench)")
    parser.add_argument("--categories", nargs="+", default=list(CATEGORIES), help=f"of {', '.join(CATEGORIES)}")
    options = parser.parse_args(list(words))
    if not options.official_root:
        raise ValueError(
            "T2I_COMPBENCH_ROOT is not set; set it to a checkout of github.com/Karine-Huang/T2I-CompBench, and "
            "T2I_COMPBENCH_PYTHON to the interpreter of its environment"
        )
    images = Path(options.images).expanduser()
    out = Path(options.out).expanduser() if options.out else images / "t2i_compbench"
    found = run_official(images, Path(options.official_root), options.python, out, options.categories)
    return "\n".join([*(_line(category, scores) for category, scores in found.items()), f"written {out}"])


def _line(category: str, scores: Sequence[float | None]) -> str:
    known = [score for score in scores if score is not None]
    mean = f"{math.fsum(known) / len(known):.4f}" if known else "-"
    without = f", {len(scores) - len(known)} without a score" if len(known) < len(scores) else ""
    return f"{category:<12} {mean:>7}  {len(scores)} images{without}"


def _parts(path: Path) -> re.Match[str]:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(
            f"{path} is not named <prompt>_<number>.png with a prompt without underscores, as T2I-CompBench wants; "
            "rename it or move it away"
        )
    return match


def _as_compared(prompt: str) -> str:
    """A prompt as the official 3-in-1 score compares prompts: up to the first full stop, in small letters."""
    return prompt.split(".")[0].lower()
