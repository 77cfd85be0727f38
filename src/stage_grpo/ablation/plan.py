"""From a grid to jobs: every run's configuration resolved and checked, equal runs in one folder."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stage_grpo.ablation.grid import Cell, Grid, HeldoutTest, check_names
from stage_grpo.ablation.job import PROMPTS, Job
from stage_grpo.checksums import sha256_of
from stage_grpo.config import StageConfig, parse_config
from stage_grpo.data import load_rows
from stage_grpo.generation.checkpoint_hash import checkpoint_sha256
from stage_grpo.heldout_plan import plan_heldout
from stage_grpo.preflight import check_files
from stage_grpo.resuming import NEUTRAL
from stage_grpo.sampling import Sampling


@dataclass(frozen=True)
class PlannedRun:
    """One run of a grid.

    Attributes:
        cell: Variant and place on the axes.
        seed: Training seed.
        config: The resolved configuration; where things are written, and restricted prompts, the job says.
        job: The training and its test, perhaps shared with runs of other grids.
        before: The test of the policy before training, shared by all runs that start from it.
    """

    cell: Cell
    seed: int
    config: StageConfig
    job: Job
    before: Job


def plan_runs(
    grid: Grid,
    out: Path,
    seeds: Sequence[int] | None = None,
    max_steps: int | None = None,
    planned: dict[str, Path] | None = None,
) -> list[PlannedRun]:
    """Resolve all runs of a grid, seed by seed.

    Args:
        grid: The grid.
        out: Folder that all grids share.
        seeds: Training seeds; by default the grid's.
        max_steps: Optimizer steps of every run; by default what the grid says.
        planned: Folders that other grids of the same call will fill, by the hash of their settings; is added to.

    Returns:
        The runs; those with equal settings and test, of this grid or another, have equal folders.

    Raises:
        ValueError: A key or value of some run is wrong, a file is missing, or two variants are the same.
    """
    base = _base(grid)
    runs, planned = [], {} if planned is None else planned
    for seed in grid.seeds if seeds is None else seeds:
        found: dict[Path, str] = {}
        for cell in grid.cells:
            try:
                run = _plan_run(grid, cell, base, out, (seed, max_steps), planned)
            except ValueError as error:
                raise ValueError(f"grid {grid.name!r}, {cell.label}: {error}") from error
            twin = found.setdefault(run.job.folder, cell.label)
            if twin != cell.label:
                raise ValueError(f"grid {grid.name!r}: {twin!r} and {cell.label!r} are the same run; leave one out")
            runs.append(run)
    return runs


def distinct_jobs(runs: Sequence[PlannedRun]) -> list[Job]:
    """The jobs of runs, each once, in an order in which early results are worth looking at."""
    tests = {run.before.folder: run.before for run in runs}
    return list((tests | {run.job.folder: run.job for run in runs}).values())


def _base(grid: Grid) -> dict[str, Any]:
    parse_config("stage ablate", [grid.base])  # for its messages
    return yaml.safe_load(Path(grid.base).read_text(encoding="utf-8"))


def _plan_run(
    grid: Grid,
    cell: Cell,
    base: Mapping[str, Any],
    out: Path,
    options: tuple[int, int | None],
    planned: dict[str, Path],
) -> PlannedRun:
    seed, max_steps = options
    check_names(cell.overrides, [option.name for option in dataclasses.fields(StageConfig)], "it")
    values = {**base, **cell.overrides, "seed": seed, "disable_tqdm": True}
    if max_steps is not None:
        values["max_steps"] = max_steps
    prompts = _restricted(str(values.get("train_prompts")), grid.train_categories) if grid.train_categories else None
    config = _resolve(values)
    if config.max_steps < 1:
        raise ValueError(f"max_steps={config.max_steps} must be at least 1, so that runs are equally long; set it")
    check_files(config)
    test, test_key = grid.test, _test_key(grid.test)
    digest = _digest({"config": _maths(config, prompts), "test": test_key})
    if digest not in planned:
        planned[digest] = _folder(out / "runs", f"{_plain(cell.label)}_seed{seed}", digest)
    folder = planned[digest]
    start = {"model": _weights(config.model), "dtype": config.dtype, "prompt_template": config.prompt_template}
    sampling = dataclasses.asdict(test_sampling(config, test))
    before = out / "before" / _digest({**start, "sampling": sampling, "test": test_key})
    own = {"output_dir": str(folder)} | ({} if prompts is None else {"train_prompts": str(folder / PROMPTS)})
    job = Job(folder, {**values, **own}, test, config.max_steps, prompts)
    return PlannedRun(cell, seed, config, job, Job(before, {**values, "output_dir": str(before)}, test, 0))


def test_sampling(config: StageConfig, test: HeldoutTest) -> Sampling:
    """How images are drawn in the test."""
    if test.guidance_scale is None:
        return config.sampling
    return dataclasses.replace(config.sampling, guidance_scale=test.guidance_scale)


def _resolve(values: Mapping[str, Any]) -> StageConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        # Through a file, because TRL's parser reads numbers such as 1e-4 there, which YAML takes for text.
        path.write_text(yaml.safe_dump({**values, "output_dir": folder}), encoding="utf-8")
        return parse_config("stage ablate", [str(path)])


def _maths(config: StageConfig, prompts: str | None) -> dict[str, Any]:
    """What decides the numbers of a run: files by their content, and nothing of where things are written."""
    # A guard that acts decides where a run goes on, by its limits and by the checkpoints that are there.
    acting = ("guard_", "save_steps", "save_total_limit") if config.guard in ("stop", "rollback") else ()
    values = config.to_json()
    kept = {name: value for name, value in values.items() if name not in NEUTRAL or name.startswith(acting)}
    kept |= {name: sha256_of(Path(kept[name])) for name in ("train_prompts", "eval_prompts") if kept[name]}
    kept |= {name: _weights(kept[name]) for name in ("model", "ref_model")}
    if prompts is not None:
        kept["train_prompts"] = hashlib.sha256(prompts.encode()).hexdigest()
    # Tests during training change no number unless the guard acts on them, but the results hold their scores.
    heldout = plan_heldout(config)
    return kept | {"heldout": heldout and [heldout.fingerprint, config.heldout_steps]}


def _weights(model: str | None) -> str | None:
    """What a policy is made of: a folder's files by their content, wherever it lies; a name of the hub as it is."""
    if model is None or not Path(model).is_dir():
        return model
    stats = [(path, path.stat()) for path in sorted(Path(model).iterdir())]
    return _hashed(model, tuple((path.name, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


@functools.cache
def _hashed(model: str, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """Checksum of a folder, read once a call of the command as long as nothing in it changes: it may be many GB."""
    return checkpoint_sha256(model)


def _test_key(test: HeldoutTest) -> dict[str, Any]:
    path = None if test.prompts is None else Path(test.prompts)
    if path is not None and not path.is_file():
        raise ValueError(f"prompts={test.prompts!r} of the test is no file; correct it")
    return {**dataclasses.asdict(test), "prompts": None if path is None else sha256_of(path)}


def _restricted(prompts: str, categories: Sequence[str]) -> str:
    """The prompts of some categories alone, as the text of a prompt file."""
    rows = [row for row in load_rows(prompts) if row.metadata.get("tag") in categories]
    if lacking := sorted(set(categories) - {row.metadata["tag"] for row in rows}):
        raise ValueError(f"train_categories {', '.join(lacking)}: {prompts} holds no prompt of them")
    return "".join(json.dumps({**row.metadata, "prompt": row.prompt}, ensure_ascii=False) + "\n" for row in rows)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _folder(parent: Path, name: str, digest: str) -> Path:
    """The folder of these settings; if an earlier call made it, under the name that it got then."""
    return next(iter(sorted(parent.glob(f"*_{digest}"))), parent / f"{name}_{digest}")


def _plain(label: str) -> str:
    """A label as a file name."""
    return "".join(letter if letter.isalnum() or letter in "-._=" else "_" for letter in label).replace("__", "_")
