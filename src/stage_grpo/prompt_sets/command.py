"""The commands ``stage data ...``: each takes the program's name and its words, and returns what to print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stage_grpo.command_line import ArgumentParser
from stage_grpo.prompt_sets.fetch import cache_folder, fetch, presence
from stage_grpo.prompt_sets.geneval_prompts import (
    PLURALS,
    PromptRecipe,
    build_rows,
    num_per_category,
    parse_ratio,
    write_rows,
)
from stage_grpo.prompt_sets.sources import PROMPT_SETS, get_prompt_set


def main_build_geneval(program: str, words: Sequence[str]) -> str:
    """Write GenEval-style training prompts: ``--ratio 0:1:7:1:4:5 --num N --seed S --out FILE``.

    Raises:
        ValueError: A wrong word or value, or a category with too few prompts.
        OSError: The file cannot be written.
    """
    parser = ArgumentParser(
        prog=program,
        description="Write GenEval-style training prompts as JSON lines, never one of the benchmark's own.",
    )
    parser.add_argument(
        "--ratio",
        default="0:1:7:1:4:5",
        help="shares of single_object:two_object:counting:colors:position:color_attr (%(default)s)",
    )
    parser.add_argument("--num", type=int, required=True, help="prompts in all")
    parser.add_argument("--seed", type=int, default=0, help="chooses the prompts and their order (%(default)s)")
    parser.add_argument("--out", required=True, help="file to write, .jsonl")
    parser.add_argument("--max-count", type=int, default=4, help="largest number to count to, 2 to 10 (%(default)s)")
    parser.add_argument(
        "--plurals", default=PLURALS[0], help="english (two benches) or benchmark (two benchs) (%(default)s)"
    )
    parser.add_argument("--repeat", action="store_true", help="use prompts again where a category runs out of them")
    options = parser.parse_args(list(words))

    recipe = PromptRecipe(
        parse_ratio(options.ratio), options.num, options.seed, options.max_count, options.plurals, options.repeat
    )
    rows = build_rows(recipe)
    write_rows(options.out, rows)
    shares = num_per_category(recipe.ratio, recipe.num)
    counts = ", ".join(f"{num} {tag}" for tag, num in shares.items() if num)
    num_different = len({row.prompt for row in rows})
    different = f", {num_different} different" if num_different < len(rows) else ""
    return f"wrote {len(rows)} prompts{different} to {options.out}: {counts}"


def main_fetch(program: str, words: Sequence[str]) -> str:
    """Fetch an official prompt set: ``NAME [--out DIR] [--from PATH]``.

    Raises:
        ValueError: A wrong word, an unknown set, or a file with the wrong checksum.
        OSError: The network or a folder does not let us.
    """
    parser = ArgumentParser(prog=program, description="Fetch an official prompt set, its checksums verified.")
    parser.add_argument("name", help=f"one of {', '.join(PROMPT_SETS)}")
    parser.add_argument("--out", metavar="DIR", help="folder for its files (a folder of its own in the cache)")
    parser.add_argument(
        "--from", dest="source", metavar="PATH", help="copy from this file or folder instead of the network"
    )
    options = parser.parse_args(list(words))

    prompt_set = get_prompt_set(options.name)
    source = Path(options.source).expanduser() if options.source else None
    if source is not None and not source.exists():
        raise ValueError(f"--from {source} does not exist; give a file or folder")
    paths = fetch(prompt_set, Path(options.out).expanduser() if options.out else None, source)
    return "\n".join(f"ready {path}" for path in paths)


def main_list(program: str, words: Sequence[str]) -> str:
    """List the official prompt sets: name, state, licence, source.

    Raises:
        ValueError: A word that is not known.
    """
    parser = ArgumentParser(
        prog=program, description="List the official prompt sets: state, licence, source and place."
    )
    parser.add_argument("--dir", help="folder that holds a folder for each set (the cache)")
    options = parser.parse_args(list(words))

    folder = Path(options.dir).expanduser() if options.dir else cache_folder()
    head = ("name", "state", "licence", "source", "holds")
    table = [head] + [
        (prompt_set.name, presence(prompt_set, folder / name), prompt_set.licence, prompt_set.home, prompt_set.title)
        for name, prompt_set in PROMPT_SETS.items()
    ]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    return "\n".join([f"folder: {folder} (STAGE_DATA chooses another)", *lines])
