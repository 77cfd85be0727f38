"""The prompts of a benchmark, each with the category it counts for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from stage_grpo.benchmarks import OCR_LENGTHS, Benchmark
from stage_grpo.data import load_rows
from stage_grpo.prompt_sets.fetch import locate
from stage_grpo.rewards.ocr import plain, quoted_text
from stage_grpo.types import PromptRow


def benchmark_rows(
    benchmark: Benchmark, prompts: str | Path | None = None, categories: Sequence[str] | None = None
) -> list[PromptRow]:
    """Read a benchmark's prompts.

    Args:
        benchmark: The benchmark.
        prompts: Its prompt file, or the folder with its prompt files where it has one a category; by default the
            official ones that ``stage data fetch`` got.
        categories: Keep the prompts of these categories alone; by default all.

    Returns:
        The prompts in the official order. The metadata name the category as ``tag``.

    Raises:
        ValueError: The prompts are not there, or not what the benchmark's prompts look like, or it lacks a category.
    """
    check_categories(benchmark, categories)
    if prompts is not None:
        files = _files_in(Path(prompts))
    elif benchmark.prompt_set is not None:
        files = locate(benchmark.prompt_set)
    else:
        raise ValueError(f"benchmark {benchmark.name!r} has no official prompts; give a prompt file")
    rows = [_tagged(benchmark, row, file) for file in _in_order(benchmark, files) for row in _rows_of(file)]
    unknown = next((row for row in rows if row.metadata["tag"] not in benchmark.columns), None)
    if unknown is not None:
        raise ValueError(
            f"prompt {unknown.prompt!r} has tag {unknown.metadata['tag']!r}, which is no category of "
            f"{benchmark.name!r}; they are {', '.join(benchmark.columns)}"
        )
    return [row for row in rows if categories is None or row.metadata["tag"] in categories]


def check_categories(benchmark: Benchmark, categories: Sequence[str] | None) -> None:
    """Refuse categories that a benchmark does not have.

    Raises:
        ValueError: There are such.
    """
    if unknown := sorted(set(categories or ()) - set(benchmark.columns)):
        raise ValueError(f"--categories {' '.join(unknown)}: {benchmark.name} has only {', '.join(benchmark.columns)}")


def _files_in(prompts: Path) -> list[Path]:
    if not prompts.is_dir():
        return [prompts]
    files = sorted(path for path in prompts.iterdir() if path.suffix.lower() in (".txt", ".json", ".jsonl", ".csv"))
    if not files:
        raise ValueError(f"{prompts} holds no prompt file (.txt, .json, .jsonl, .csv); name the right folder")
    return files


def _in_order(benchmark: Benchmark, files: Sequence[Path]) -> list[Path]:
    """Files named like categories, in the order of the categories; else the only file."""
    by_category = {file.stem.removesuffix("_val"): file for file in files}
    named = [by_category[column] for column in benchmark.columns if column in by_category]
    if named:
        return named
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"of {names} none is named like a category of {benchmark.name!r}; name one prompt file")
    return list(files)


def _rows_of(file: Path) -> list[PromptRow]:
    if file.suffix.lower() != ".json":
        return load_rows(file)
    try:
        prompts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no JSON list of prompts ({error}); fetch it again") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError(f"{file} must be a JSON list of prompts")
    return [PromptRow(prompt.strip(), {}) for prompt in prompts]


def _tagged(benchmark: Benchmark, row: PromptRow, file: Path) -> PromptRow:
    category = file.stem.removesuffix("_val")
    if isinstance(row.metadata.get("tag"), str):
        tag = row.metadata["tag"]
    elif category in benchmark.columns:
        tag = category
    elif "Category" in row.metadata:
        tag = str(row.metadata["Category"]).strip()
    elif tuple(OCR_LENGTHS) == benchmark.columns:
        tag = _length_category(row.prompt)
    else:
        tag = None
    return PromptRow(row.prompt, {**row.metadata, "prompt": row.prompt, "tag": tag})


def _length_category(prompt: str) -> str:
    length = len(plain(quoted_text(prompt) or ""))
    return next(name for name, most in OCR_LENGTHS.items() if most is None or length <= most)
