"""The door ``eval/cal_ocr_score.py``: text rendering as users of the released code score it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from stage_grpo.benchmark_rows import benchmark_rows
from stage_grpo.benchmarks import get_benchmark
from stage_grpo.command_line import ArgumentParser
from stage_grpo.evaluation.evaluate import evaluate
from stage_grpo.evaluation.score_table import format_table
from stage_grpo.evaluation.scores import Scores, measured
from stage_grpo.evaluation.statistics import stratified_mean
from stage_grpo.images.files import write_whole
from stage_grpo.rewards.ocr import ENGINES

_NUM_LISTED = 20


def main_ocr_score(program: str, words: Sequence[str]) -> str:
    """Run ``eval/cal_ocr_score.py --image_root DIR``: score what there is of a set, and write a line an image.

    Args:
        program: Name of the program.
        words: Its arguments.

    Returns:
        The summary, with the mean by length of the text.

    Raises:
        ValueError: A wrong word or value, no prompts, no images, or no OCR engine.
        OSError: The file cannot be written.
    """
    options = _parser(program).parse_args(list(words))
    if options.ocr_base_root is not None:
        raise ValueError(
            f"--ocr_base_root {options.ocr_base_root}: the engine brings its own networks, so leave it out "
            "(docs/evaluation.md says which)"
        )
    rows = benchmark_rows(get_benchmark("ocr"), options.txt_path and Path(options.txt_path).expanduser())
    scores = evaluate(
        "ocr",
        Path(options.image_root).expanduser(),
        prompts=options.txt_path and Path(options.txt_path).expanduser(),
        reward_options={"ocr": {"engine": options.engine, "substring_match": options.substring_match}},
        allow_partial=True,
        batch_size=options.batch_size,
    )
    out = Path(options.output_csv).expanduser()
    _write_csv(out, scores)
    there = {record["index"] for record in scores.per_image}
    missing = [index for index in range(len(rows)) if index not in there]
    mean = stratified_mean(measured(scores.per_image, "ocr"))  # over all samples, whichever lengths there are
    lines = [f"[OCR] Samples={scores.num_images}, Missing={len(missing)}, AvgScore={mean:.4f}"]
    lines += [f"[OCR] Missing indices (first {_NUM_LISTED}): {missing[:_NUM_LISTED]}"] if missing else []
    return "\n".join([*lines, format_table(scores), f"wrote {out}"])


def _parser(program: str) -> ArgumentParser:
    parser = ArgumentParser(prog=program, description="Score rendered text: prompts' quoted text, read by OCR.")
    parser.add_argument("--image_root", required=True, metavar="DIR", help="holds 00000.png, 00001.png, ... (or .jpg)")
    parser.add_argument("--txt_path", metavar="FILE", help="prompts, one a line (those of stage data fetch ocr)")
    parser.add_argument("--output_csv", default="ocr_scores.csv", metavar="FILE", help="file to write (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="images read at a time (%(default)s)")
    parser.add_argument("--ocr_base_root", help="not needed here; refused")
    parser.add_argument("--engine", choices=ENGINES, default=next(iter(ENGINES)), help="what reads (%(default)s)")
    parser.add_argument(
        "--substring_match", action="store_true", help="text found anywhere counts in full, as in the released code"
    )
    return parser


def _write_csv(path: Path, scores: Scores) -> None:
    """One line an image, as the released code writes it; no score is an empty cell. The file appears when whole."""
    sheet = io.StringIO(newline="")
    writer = csv.writer(sheet)
    writer.writerow(["index", "filename", "prompt", "ocr_score"])
    for record in scores.per_image:
        writer.writerow([record["index"], record["path"], record["prompt"], record["scores"]["ocr"]])
    write_whole(path, sheet.getvalue().encode())
