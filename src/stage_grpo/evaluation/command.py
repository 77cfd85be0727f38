"""The command ``stage evaluate``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage_grpo.benchmarks import BENCHMARKS
from stage_grpo.command_line import ArgumentParser
from stage_grpo.evaluation.diversity import SPACES
from stage_grpo.evaluation.evaluate import evaluate
from stage_grpo.evaluation.score_table import format_table


def main_evaluate(program: str, words: Sequence[str]) -> str:
    """Run ``stage evaluate --benchmark NAME --images DIR [--out scores.json]``.

    With ``--out``, every reward's results are kept in ``scores.json.partial/`` while it runs, so that the same
    command goes on where a killed one stopped.

    Returns:
        The table of scores.

    Raises:
        ValueError: A wrong word or value, an image set that is not whole, or nothing that can be measured.
        OSError: The file cannot be written.
    """
    options = _parser(program).parse_args(list(words))
    out = Path(options.out).expanduser() if options.out else None
    if out is not None and (out.is_dir() or out.suffix != ".json"):
        raise ValueError(f"--out {out} must be a file ending in .json, e.g. scores.json")
    cache = out and out.with_name(f"{out.name}.partial")
    scores = evaluate(
        options.benchmark,
        Path(options.images).expanduser(),
        prompts=options.prompts and Path(options.prompts).expanduser(),
        categories=options.categories,
        num_images=options.num_images,
        measures=options.measures and [name.strip() for name in options.measures.split(",") if name.strip()],
        reward_options=_reward_options(options.reward_options),
        allow_partial=options.allow_partial,
        batch_size=options.batch_size,
        num_resamples=options.num_resamples,
        diversity_space=options.diversity,
        cache_dir=cache,
    )
    if out is None or cache is None:
        return format_table(scores)
    scores.save(out)
    said = f"{format_table(scores)}\nwrote {out}"
    if scores.missing or any(scores.num_unscored.values()):
        return f"{said}; the same command measures what has no score yet, and takes the rest from {cache}"
    shutil.rmtree(cache, ignore_errors=True)
    return said


def _parser(program: str) -> ArgumentParser:
    parser = ArgumentParser(prog=program, description="Score a folder of generated images on a benchmark.")
    parser.add_argument("--benchmark", required=True, help=f"one of {', '.join(BENCHMARKS)}")
    parser.add_argument("--images", required=True, metavar="DIR", help="the images, as stage generate writes them")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write; a killed evaluation into it goes on")
    parser.add_argument("--prompts", metavar="PATH", help="prompts of the images (official ones, else the set's own)")
    parser.add_argument("--categories", nargs="+", help="what was generated, if by --categories (all)")
    parser.add_argument("--num-images", type=int, help="images of each prompt (what the set says)")
    parser.add_argument("--measures", metavar="A,B", help="measures to compute (all)")
    parser.add_argument(
        "--reward-options", default="{}", metavar="JSON", help='by reward, e.g. \'{"deqa": {"url": "http://..."}}\''
    )
    parser.add_argument(
        "--allow-partial", action="store_true", help="score what there is of a set that is not whole, marked as such"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images read at a time (%(default)s)")
    parser.add_argument("--num-resamples", type=int, default=4000, help="of each interval (%(default)s)")
    parser.add_argument(
        "--diversity", default="auto", choices=SPACES, help="where images of one prompt are compared (%(default)s)"
    )
    return parser


def _reward_options(text: str) -> dict[str, dict[str, Any]]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--reward-options {text!r} is no JSON ({error}); write {{NAME: {{OPTION: VALUE}}}}"
        ) from None
    if not isinstance(options, dict) or not all(isinstance(value, dict) for value in options.values()):
        raise ValueError(f'--reward-options {text} must be {{NAME: {{OPTION: VALUE}}}}, e.g. {{"deqa": {{}}}}')
    return options
