"""Results that papers report, to stand beside one's own. They come without intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from stage_grpo.benchmarks import get_benchmark
from stage_grpo.option_checks import is_number

_FILE = "published_results.json"
_FIELDS = {
    "benchmark": str,
    "measure": str,
    "unit": str,
    "decimals": int,
    "source": str,
    "columns": list,
    "rows": dict,
}
_LINES = ("overall", "heldout")


@dataclass(frozen=True)
class PublishedRow:
    """One model's figures of one measure.

    Attributes:
        name: The model, as the paper calls it.
        benchmark: Name in `stage_grpo.benchmarks.BENCHMARKS`.
        measure: What `stage_grpo.evaluation.scores.Scores` calls the measure.
        unit: The measure in words, with its range where it has one.
        decimals: Decimals of the figures as published.
        scores: Column or "overall" to figure; None where the paper gives none.
        source: Paper and tables.
        note: What to know before comparing with its table; empty if nothing.
        row_note: What to know before comparing with this model; empty if nothing.
    """

    name: str
    benchmark: str
    measure: str
    unit: str
    decimals: int
    scores: Mapping[str, float | None]
    source: str
    note: str = ""
    row_note: str = ""


def published_rows(benchmark: str, measure: str | None = None) -> list[PublishedRow]:
    """The published results of a benchmark.

    Args:
        benchmark: Name of a benchmark.
        measure: One measure; None for all.

    Returns:
        Rows in the order of the tables; none if nothing is published on the benchmark or measure.

    Raises:
        ValueError: No such benchmark.
    """
    get_benchmark(benchmark)
    return [row for row in _all_rows() if row.benchmark == benchmark and measure in (None, row.measure)]


@cache
def _all_rows() -> tuple[PublishedRow, ...]:
    text = files("stage_grpo.comparison").joinpath(_FILE).read_text(encoding="utf-8")
    return tuple(parse_published(json.loads(text)))


def parse_published(content: Any) -> list[PublishedRow]:
    """Rows of tables of published results, checked.

    Args:
        content: What JSON gave: ``{"tables": [{"benchmark", "measure", "unit", "decimals", "source", "columns",
            "rows": {name: [figure or null, one a column]}, "note"?}], "row_notes"?: {name: note}}``.

    Returns:
        The rows of all tables.

    Raises:
        ValueError: A field is missing or of a wrong type, a benchmark, measure or column is unknown or repeated, a
            row is too short, too long, empty or holds something that is no finite number, a note is on no row.
    """
    tables = content.get("tables") if isinstance(content, dict) else None
    if not isinstance(tables, list):
        raise ValueError(f"{_FILE} has no list of tables; write {{'tables': [...]}}.")
    rows, seen = [], set()
    for place, table in enumerate(tables):
        where = f"{_FILE}, table {place}"
        _check_table(table, where)
        if (key := (table["benchmark"], table["measure"])) in seen:
            raise ValueError(f"{where} is the second of {key[0]} {key[1]}; put its rows into the first.")
        seen.add(key)
        rows += [_row(table, name, figures, where) for name, figures in table["rows"].items()]
    return _with_notes(rows, content.get("row_notes", {}))


def _with_notes(rows: list[PublishedRow], notes: Any) -> list[PublishedRow]:
    names = [row.name for row in rows]
    for name, note in notes.items() if isinstance(notes, dict) else [(notes, None)]:
        if name not in names or not isinstance(note, str):
            raise ValueError(f"{_FILE}: the note {note!r} on row {name!r}; write row_notes as {{row: text}}.")
    return [replace(row, row_note=notes.get(row.name, "")) for row in rows]


def _check_table(table: Any, where: str) -> None:
    for name, kind in _FIELDS.items():
        if not isinstance(table, dict) or not isinstance(table.get(name), kind):
            raise ValueError(f"{where} lacks {name!r}; give it as {kind.__name__}.")
    benchmark = get_benchmark(table["benchmark"])
    if table["measure"] not in benchmark.measures:
        known = ", ".join(benchmark.measures)
        raise ValueError(f"{where}: {benchmark.name} has no measure {table['measure']!r}; it has {known}.")
    columns, known = table["columns"], (*benchmark.columns, *_LINES)
    if not columns or len(set(columns)) != len(columns) or not set(columns) <= set(known):
        raise ValueError(f"{where} has columns {columns}; give each once, of {', '.join(known)}.")


def _row(table: dict[str, Any], name: str, figures: Any, where: str) -> PublishedRow:
    columns = table["columns"]
    if not isinstance(figures, list) or len(figures) != len(columns):
        raise ValueError(f"{where}, {name!r}: {figures} does not give one figure for each of {len(columns)} columns.")
    for figure in figures:
        if figure is not None and not (is_number(figure) and math.isfinite(figure)):
            raise ValueError(f"{where}, {name!r}: {figure!r} is no figure; write a number or null.")
    if all(figure is None for figure in figures):
        raise ValueError(f"{where}, {name!r} has no figure; leave the row out.")
    scores = {column: None if figure is None else float(figure) for column, figure in zip(columns, figures)}
    return PublishedRow(
        name=name,
        benchmark=table["benchmark"],
        measure=table["measure"],
        unit=table["unit"],
        decimals=table["decimals"],
        scores=MappingProxyType(scores),
        source=table["source"],
        note=table.get("note", ""),
    )
