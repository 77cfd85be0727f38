"""Prompt files: read them, check them, and hand them to the trainer."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stage_grpo.rewards.geneval import parse_metadata
from stage_grpo.rewards.t2i_r1_rows import parse_row
from stage_grpo.types import PromptRow

if TYPE_CHECKING:
    from datasets import Dataset

_CSV_COLUMNS = ("prompt", "prompts")


def load_rows(path: str | os.PathLike[str]) -> list[PromptRow]:
    """Reads prompts from a file, in the file's order.

    * ``.txt``: one prompt a line; blank lines are skipped.
    * ``.jsonl``: one JSON object a line with a ``"prompt"``; the whole object becomes the metadata and, where it
      has an ``"include"`` or a ``"task_type"``, must be valid metadata of GenEval or of T2I-R1.
    * ``.csv``: a header with a column ``prompt`` or ``Prompts``; the other columns become the metadata.

    Args:
        path: a UTF-8 file, with or without a byte order mark.

    Returns:
        One row per prompt; the metadata of a text file are empty.

    Raises:
        ValueError: an unknown extension, a file that cannot be read or is not UTF-8, broken JSON, a missing or
            empty prompt, invalid GenEval metadata, or no prompt at all. The message names file and line.
    """
    path = Path(path)
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: unknown kind of prompt file {path.suffix!r}; use .txt, .jsonl or .csv")
    rows = list(readers[path.suffix.lower()](path, _decode(path)))
    if not rows:
        raise ValueError(f"{path}: the file holds no prompt; write at least one")
    return rows


def to_dataset(rows: Sequence[PromptRow]) -> Dataset:
    """Rows as a dataset of two string columns, ``prompt`` and ``metadata``.

    ``metadata`` is a JSON string: as a struct, Arrow would fill every key that a row lacks with nulls.

    Raises:
        ValueError: no rows.
    """
    from datasets import Dataset  # heavy, and reading a prompt file does not need it

    if not rows:
        raise ValueError("no prompt rows given; a dataset needs at least one")
    encoded = [json.dumps(row.metadata, ensure_ascii=False) for row in rows]
    return Dataset.from_dict({"prompt": [row.prompt for row in rows], "metadata": encoded})


def _decode(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{path}: cannot be read ({reason}); check the path and its permissions") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _read_text(path: Path, text: str) -> Iterator[PromptRow]:
    yield from (PromptRow(line.strip(), {}) for _, line in _lines(text))


def _read_jsonl(path: Path, text: str) -> Iterator[PromptRow]:
    for number, line in _lines(text):
        where = f"{path}, line {number}"
        try:
            metadata = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: broken JSON ({error}); write one JSON object a line") from None
        if not isinstance(metadata, dict):
            raise ValueError(f"{where}: found {metadata!r}; write one JSON object a line")
        prompt = _checked_prompt(where, metadata.get("prompt"), '"prompt": "..."')
        if metadata.get("include") is not None:
            _check_at(where, parse_metadata, metadata)
        if metadata.get("task_type") is not None:
            _check_at(where, parse_row, metadata)
        yield PromptRow(prompt, metadata)


def _read_csv(path: Path, text: str) -> Iterator[PromptRow]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    start = 1  # first line of the record: a quoted prompt may go over several
    try:
        columns = [name for name in reader.fieldnames or [] if name.strip().lower() in _CSV_COLUMNS]
        if not columns:
            raise ValueError(
                f"{path}, line 1: no column 'prompt' or 'Prompts' among {list(reader.fieldnames or [])}; name one"
            )
        start = reader.reader.line_num + 1
        for record in reader:
            where = f"{path}, line {start}"
            prompt = _checked_prompt(where, record.pop(columns[0]), f"the column {columns[0]!r}")
            # None is csv's key for values beyond the header.
            if None in record:
                raise ValueError(f"{where}: more values than the header has columns; put the prompt in quotes")
            yield PromptRow(prompt, dict(record))
            start = reader.reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: broken CSV ({error}); check the quotes") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank. Only newlines end a line: prompts may hold any other separator."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _checked_prompt(where: str, prompt: object, remedy: str) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: the prompt is {prompt!r}; fill {remedy} with text")
    return prompt.strip()


def _check_at(where: str, check: Callable[[dict[str, Any]], object], metadata: dict[str, Any]) -> None:
    try:
        check(metadata)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
