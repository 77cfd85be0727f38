"""The command ``stage ablate``: run grids, then write their results, tables and pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from stage_grpo.command_line import ArgumentParser


def main_ablate(program: str, words: list[str]) -> tuple[str, int]:
    """Run ``stage ablate``.

    Args:
        program: Name shown in the help.
        words: Arguments after it.

    Returns:
        What to print, and the exit code: 1 if a run failed or cannot be read.

    Raises:
        ValueError: Wrong arguments, or a grid with something wrong; then no run has begun.
        KeyboardInterrupt: A signal came; the same command goes on from there.
    """
    options = _parser(program).parse_args(words)

    from stage_grpo.ablation.grid import check_seeds, load_grid
    from stage_grpo.ablation.plan import distinct_jobs, plan_runs
    from stage_grpo.ablation.results import collect
    from stage_grpo.ablation.runs import default_parallel, run_jobs

    if options.seeds is not None:
        check_seeds(options.seeds)
    for flag in ("jobs", "max_steps"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(options, flag)} must be at least 1")
    grids = [load_grid(path) for path in options.grids]
    names = [grid.name for grid in grids]
    if len(set(names)) < len(names):
        raise ValueError(f"grids {', '.join(names)} must have different names: each gets a folder of that name")
    planned: dict[str, Path] = {}
    plans = [plan_runs(grid, options.out, options.seeds, options.max_steps, planned) for grid in grids]
    jobs = distinct_jobs([run for plan in plans for run in plan])
    if options.dry:
        return _describe(jobs, [len(plan) for plan in plans], names), 0
    failures = run_jobs(jobs, options.jobs or default_parallel(), options.keep_weights)
    said = [f"failed: {failure.folder}: {failure.reason}" for failure in failures]
    is_whole = not failures
    for grid, plan in zip(grids, plans):
        try:
            results = collect(grid, plan)
        except ValueError as error:
            said.append(str(error))
            is_whole = False
            continue
        said.append(_write(results, options.out / grid.name))
        is_whole = is_whole and not results.missing
    return "\n".join(said), 0 if is_whole else 1


def _parser(program: str) -> ArgumentParser:
    parser = ArgumentParser(prog=program, description="Run grids of trainings. What is finished is not run again.")
    parser.add_argument("grids", nargs="+", metavar="GRID.yaml", help="grids, e.g. configs/ablation/table4.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", help="training seeds (the grid's)")
    parser.add_argument("--max-steps", type=int, help="optimizer steps of every run (the grid's)")
    parser.add_argument("--out", type=Path, default=Path("outputs/ablation"), help="folder that all grids share")
    parser.add_argument("--jobs", type=int, help="processes at a time (one a GPU, or one a core)")
    parser.add_argument("--keep-weights", action="store_true", help="keep trained weights after their test")
    parser.add_argument("--dry", action="store_true", help="check everything and say what would run")
    return parser


def _describe(jobs: Sequence, num_runs: Sequence[int], names: Sequence[str]) -> str:
    trainings = [job for job in jobs if job.num_steps]
    waiting = [job for job in trainings if not job.is_finished]
    lines = [f"{name}: {count} runs" for name, count in zip(names, num_runs)]
    lines += [f"  {'finished' if job.is_finished else 'to run  '}  {job.folder.name}" for job in trainings]
    steps = sum(job.num_steps for job in waiting)
    return "\n".join([*lines, f"{len(trainings)} different trainings, {len(waiting)} to run, {steps} steps in all"])


def _write(results, folder: Path) -> str:
    """Write everything that is told about a grid; gives its table and the page's path."""
    from stage_grpo.ablation.page import to_html
    from stage_grpo.ablation.picture import to_png
    from stage_grpo.ablation.table import to_markdown
    from stage_grpo.images.files import write_whole
    from stage_grpo.run_folder import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    table = to_markdown(results)
    write_atomically(folder / "results.json", json.dumps(results.to_json(), indent=1) + "\n")
    write_atomically(folder / "table.md", table)
    write_atomically(folder / "report.html", to_html(results))
    write_whole(folder / "picture.png", to_png(results))
    return f"{table}\nreport: {folder / 'report.html'}"
