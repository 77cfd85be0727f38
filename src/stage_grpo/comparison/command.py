"""The command ``stage compare``: score files against the first of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from stage_grpo.command_line import ArgumentParser
from stage_grpo.comparison.compare import Comparison, Side, compare_sides
from stage_grpo.comparison.text import to_json, to_markdown, to_text
from stage_grpo.evaluation.scores import Scores

_SUFFIXES = (".md", ".html", ".json")


def main_compare(program: str, words: list[str]) -> str:
    """Run ``stage compare``.

    Args:
        program: Name shown in the help.
        words: Arguments after it.

    Returns:
        What to print: the comparison as text, and the name of the file written.

    Raises:
        ValueError: Wrong arguments, a file without scores, or sides that do not compare.
    """
    parser = ArgumentParser(prog=program, description="Compare scores with those of the first file.")
    parser.add_argument("files", nargs="+", metavar="SCORES.json", help="files of `stage evaluate --out`")
    parser.add_argument("--measure", help="one measure (all that every file has)")
    parser.add_argument("--published", action="store_true", help="show published results beside")
    parser.add_argument("--unpaired", action="store_true", help="resample each side by itself")
    parser.add_argument("--names", help="names of the files, joined by commas")
    parser.add_argument("--out", help="also write a file: .md, .html or .json")
    options = parser.parse_args(words)
    out = Path(options.out).expanduser() if options.out else None
    write = _writer(out) if out else None
    paths = [Path(name) for name in options.files]
    names = _names(paths, options.names)
    sides = [Side(name, Scores.load(path)) for name, path in zip(names, paths)]
    comparison = compare_sides(
        sides, measure=options.measure, paired=not options.unpaired, with_published=options.published
    )
    text = to_text(comparison)
    if out is None or write is None:
        return text
    _write(out, write(comparison))
    return f"{text}\n\nwrote {out}"


def _writer(out: Path) -> Callable[[Comparison], str]:
    """What makes the content of a file, by its suffix.

    Raises:
        ValueError: The suffix is unknown, or the path is a folder.
    """
    if out.suffix not in _SUFFIXES or out.is_dir():
        raise ValueError(f"--out {out} is no file of a known kind; let it end in {', '.join(_SUFFIXES)}.")
    if out.suffix == ".html":
        from stage_grpo.comparison.page import to_html

        return to_html
    return to_markdown if out.suffix == ".md" else to_json


def _names(paths: Sequence[Path], given: str | None) -> list[str]:
    """What tables call each file: as given, or the shortest of stem, folder and whole path that tells them apart.

    Raises:
        ValueError: The names given are too few, too many, empty or repeated, or one file is given twice.
    """
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        if len(names) != len(paths) or not all(names) or len(set(names)) != len(names):
            raise ValueError(f"--names {given} must name each of the {len(paths)} files, all differently.")
        return names
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) != len(resolved):
        twice = next(path for path in paths if resolved.count(path.resolve()) > 1)
        raise ValueError(f"{twice} is given twice; compare two files.")
    stems = [path.stem.removesuffix(".scores") for path in resolved]
    for names in (stems, [path.parent.name for path in resolved]):
        if len(set(names)) == len(names) and all(names):
            return names
    return [str(path) for path in paths]


def _write(path: Path, content: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(path)
