"""The commands ``stage weights ...``: each takes the program's name and its words, and returns what to print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from stage_grpo.command_line import ArgumentParser
from stage_grpo.weights.cache import SOURCE, cache_folder, defect, get
from stage_grpo.weights.catalog import WEIGHTS, WeightEntry, get_entry


def main_get(program: str, words: Sequence[str]) -> str:
    """Get weights of reward models: ``NAME [NAME ...] [--from PATH]``.

    Raises:
        ValueError: A wrong word, unknown weights, or a file with the wrong checksum.
        OSError: The network or a folder does not let us.
    """
    parser = ArgumentParser(
        prog=program, description="Get weights of reward models, verified by their checksums where known, converted."
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"one of {', '.join(WEIGHTS)}")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PATH",
        help="take files from this folder (or this file) instead of the network, replacing weights that are there; "
        "those without a known checksum only from PATH/NAME",
    )
    options = parser.parse_args(list(words))

    for name in options.names:
        get_entry(name)  # a misspelt name should show before the first gigabyte
    source = Path(options.source).expanduser() if options.source else None
    return "\n".join(line for name in options.names for line in _got(name, source))


def _got(name: str, source: Path | None) -> list[str]:
    folder = get(name, source)
    files = json.loads((folder / SOURCE).read_text(encoding="utf-8"))["files"]
    unchecked = [
        f"  {file}: no official SHA-256 is known; what came has {known['sha256']}"
        for file, known in files.items()
        if not known["checked"]
    ]
    return [f"ready {folder}", *unchecked]


def main_list(program: str, words: Sequence[str]) -> str:
    """List the weights: name, state, size, licence, home.

    Raises:
        ValueError: A word that is not known.
    """
    parser = ArgumentParser(prog=program, description="List the weights of reward models: state, licence and home.")
    parser.parse_args(list(words))

    rows = [("name", "state", "licence", "home", "note")]
    rows += [(name, _state(name), entry.licence, entry.home, _note(entry)) for name, entry in WEIGHTS.items()]
    return "\n".join([f"folder: {cache_folder()} (STAGE_WEIGHTS chooses another)", *as_table(rows)])


def _state(name: str) -> str:
    place = cache_folder() / name
    if defect(place) is None:
        return "present"
    if place.is_dir():
        return "damaged"
    return "begun" if (cache_folder() / ".sources" / name).is_dir() else "missing"


def _note(entry: WeightEntry) -> str:
    size = f"{entry.size / 1e9:.1f} GB" if entry.size > 1e8 else ""
    return "; ".join(part for part in (size, entry.note) if part)


def as_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
