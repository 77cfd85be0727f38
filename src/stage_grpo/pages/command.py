"""The command ``stage report``: the report of a run, or a gallery of image sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stage_grpo.command_line import ArgumentParser
from stage_grpo.pages.thumbnails import THUMBNAIL_SIZE


def main_report(program: str, words: Sequence[str]) -> str:
    """Write the report of a run folder, or a gallery of one or more image sets side by side.

    Args:
        program: Name shown in the help.
        words: The command line's words after it.

    Returns:
        What was written.

    Raises:
        ValueError: A folder is neither a run nor an image set, runs and sets are mixed, or there are several runs,
            or the file to write is a folder.
    """
    options = _parser(program).parse_args(list(words))
    out = Path(options.out).expanduser() if options.out else None
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file, e.g. {out / 'report.html'}")
    folders = [Path(folder).expanduser() for folder in options.folders]
    runs, sets = _sorted_out(folders)
    if runs and sets:
        raise ValueError(f"{runs[0]} is a run and {sets[0]} an image set; report a run, or image sets")
    if len(runs) > 1:
        raise ValueError(f"{len(runs)} runs ({', '.join(map(str, runs))}); report one at a time")
    if runs:
        from stage_grpo.pages.report import write_run_report

        if options.scores:
            raise ValueError(f"--scores belongs to image sets, and {runs[0]} is a run; leave it out")
        return f"wrote {write_run_report(runs[0], out)}"
    from stage_grpo.pages.gallery import write_gallery

    scores = [Path(name).expanduser() for name in options.scores.split(",")] if options.scores else None
    return f"wrote {write_gallery(sets, out, scores=scores, thumbnail_size=options.thumbnail)}"


def _parser(program: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=program,
        description="Write one HTML file: the report of a training run's folder, or a gallery of the folders of "
        "generated images, side by side.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="one run folder, or one or more image sets")
    parser.add_argument("--out", help="file to write (DIR/report.html of a run, DIR.gallery.html of image sets)")
    parser.add_argument(
        "--scores",
        help="scores of the image sets, joined by commas, in their order (DIR/scores.json or DIR.scores.json)",
    )
    parser.add_argument(
        "--thumbnail",
        type=int,
        default=THUMBNAIL_SIZE,
        metavar="PIXELS",
        help=f"longer side of the images within the file ({THUMBNAIL_SIZE})",
    )
    return parser


def _sorted_out(folders: list[Path]) -> tuple[list[Path], list[Path]]:
    """Runs and image sets."""
    from stage_grpo.pages.gallery_sets import is_image_set

    runs, sets = [], []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give a training run's folder, or folders of images")
        if _is_run(folder):
            runs.append(folder)
        elif is_image_set(folder):
            sets.append(folder)
        else:
            raise ValueError(
                f"{folder} holds no run.json, metrics.jsonl or samples, and no image; "
                "give a training run's folder, or folders of images"
            )
    return runs, sets


def _is_run(folder: Path) -> bool:
    named = any((folder / name).is_file() for name in ("run.json", "metrics.jsonl"))
    return named or any((folder / "samples").glob("step_*.json"))
