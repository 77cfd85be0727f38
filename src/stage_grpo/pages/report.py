"""HTML reports of a run and of a before/after pair: one file, no outside resource, good to print.

Reads what is on disk (run folder, scores, images) and never loads a policy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from stage_grpo.benchmarks import get_benchmark
from stage_grpo.evaluation.scores import Scores
from stage_grpo.pages import before_after, charts
from stage_grpo.pages.render import render
from stage_grpo.run_record import RunRecord, Samples, read_run

_MAX_GROUP_IMAGES = 8


@dataclass(frozen=True)
class ChartLine:
    """A chart of the report: its title, what to see in it, and metric name to label in the legend."""

    title: str
    note: str
    metrics: Mapping[str, str]
    dashed: tuple[str, ...] = ()


CHARTS = (
    ChartLine("Reward", "What training maximises, all rewards weighted and summed.", {"reward": "reward"}),
    ChartLine("Held-out score", "On prompts that are not trained on; see heldout.jsonl.", {"heldout/score": "score"}),
    ChartLine(
        "KL from the reference",
        "k3 estimate a token, nats. A steady rise is learning; a jump is drift.",
        {"kl": "KL", "kl_weighted": "weighted KL"},
    ),
    ChartLine(
        "Entropy",
        "Mean over tokens, nats. The entropy reward holds the policy near the reference.",
        {"entropy/policy": "policy", "entropy/reference": "reference"},
        dashed=("reference",),
    ),
    ChartLine(
        "Token weights",
        "Mean similarity to images of opposite advantage, and the weights made of it.",
        {
            "similarity/mean": "similarity",
            "advantage_weights/mean": "advantage weight M",
            "kl_weights/mean": "KL weight",
        },
    ),
    ChartLine(
        "Diversity",
        "Share of different images in a group, and of groups whose rewards all tie.",
        {"unique_images": "unique images", "frac_reward_zero_std": "tied groups"},
    ),
    ChartLine(
        "Seconds a step",
        "Where the time goes.",
        {
            "seconds/rollout": "rollout",
            "seconds/decode": "decode",
            "seconds/reward": "reward",
            "seconds/reference": "reference",
            "seconds/update": "update",
        },
    ),
)


def write_demo_report(
    path: str | Path,
    before: Scores,
    after: Scores,
    run_dir: str | Path,
    before_images: str | Path,
    after_images: str | Path,
    seconds: int | float | Mapping[str, int | float],
    *,
    title: str = "STAGE on the shapes world",
    pairs_per_category: int = 3,
) -> Path:
    """Write the report of a training run with the same prompts and seeds before and after.

    Args:
        path: The HTML file to write; its folder is made.
        before: Scores before training.
        after: Scores after training, of the same prompts in the same order.
        run_dir: The run folder.
        before_images: Image folder that ``before`` was computed from.
        after_images: Image folder that ``after`` was computed from.
        seconds: Wall time in all, or phase to seconds.
        title: Heading.
        pairs_per_category: Image pairs shown of each category, picked by their place and not by their result.

    Returns:
        The file written.

    Raises:
        ValueError: ``before`` and ``after`` do not pair, an image is missing, or there is no run folder.
    """
    run = read_run(run_dir)
    phases = dict(seconds) if isinstance(seconds, Mapping) else {"in all": float(seconds)}
    context = _run_context(run) | {
        "title": title,
        "headline": before_after.headline(before, after, run, sum(phases.values())),
        "tables": [before_after.comparison_table(before, after, m) for m in before.scores],
        "dots": Markup(before_after.dots(before, after)),
        "pairs": before_after.pairs(before, after, Path(before_images), Path(after_images), pairs_per_category),
        "phases": phases,
        "evaluation": {
            "benchmark": get_benchmark(before.benchmark).title,
            **{name: _plain(value) for name, value in after.settings.items()},
        },
    }
    return _write(Path(path), context)


def write_run_report(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of a run folder alone: curves, samples, weights, configuration.

    Args:
        run_dir: The run folder.
        path: The HTML file; by default ``report.html`` in the run folder.

    Returns:
        The file written.

    Raises:
        ValueError: There is no such folder, or it holds nothing of a run.
    """
    run = read_run(run_dir)
    if not (run.metrics or run.config or run.sample_steps):
        raise ValueError(f"{run.path} holds no run.json, metrics.jsonl or samples; give a training run's folder.")
    context = _run_context(run) | {
        "title": f"Training run {run.path.resolve().name}",
        "headline": _run_headline(run),
        "tables": [],
        "dots": None,
        "pairs": [],
        "phases": {},
        "evaluation": {},
    }
    return _write(Path(path) if path else run.path / "report.html", context)


def _write(path: Path, context: dict[str, Any]) -> Path:
    page = render("report", **context)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _run_context(run: RunRecord) -> dict[str, Any]:
    """What both reports show of a run."""
    config = {name: _plain(value) for name, value in sorted(run.config.items()) if value is not None}
    return {
        "charts": _charts(run),
        "weights": _weights(run),
        "progress": _progress(run),
        "config": config,
        "about": {name: _plain(value) for name, value in run.about.items() if value is not None},
        "versions": run.versions,
    }


def _charts(run: RunRecord) -> list[dict[str, Any]]:
    """The charts whose metrics were logged."""
    shown = []
    for line in CHARTS:
        series = {name: run.series(metric) for metric, name in line.metrics.items()}
        series = {name: points for name, points in series.items() if points[0]}
        if series:
            svg = charts.line_chart(series, salt=line.title, dashed=line.dashed)
            shown.append({"title": line.title, "note": line.note, "svg": Markup(svg)})
    return shown


def _run_headline(run: RunRecord) -> list[dict[str, str]]:
    steps, rewards = run.series("reward")
    cards = [{"value": str(run.num_steps), "name": "steps", "detail": f"seed {run.about.get('seed', '-')}"}]
    if steps:
        tenth = max(1, len(rewards) // 10)
        first, last = np.mean(rewards[:tenth]), np.mean(rewards[-tenth:])
        detail = f"mean of the first and of the last {tenth} logged steps"
        cards.append({"value": f"{first:.3f} → {last:.3f}", "name": "reward", "detail": detail})
    seconds = sum(run.series("step_time")[1])
    if seconds:
        cards.append(
            {"value": before_after.duration(seconds), "name": "in training steps", "detail": "sum of the logged steps"}
        )
    return cards


def _weights(run: RunRecord) -> dict[str, Any] | None:
    """The token weights over the images of one group: of the last saved step, the group with the widest rewards."""
    for step in reversed(run.sample_steps):
        samples = run.samples(step)
        if samples is None or samples.weights is None or samples.grid is None:
            continue
        start = _widest_group(samples)
        group = range(start, min(start + samples.columns, len(samples.images)))[:_MAX_GROUP_IMAGES]
        flat = np.array([samples.weights[i] for i in group])
        scale = (float(flat.min()), float(flat.max()))
        images = [
            {
                "uri": charts.data_uri(samples.images[i]),
                "overlay": charts.data_uri(
                    charts.weight_overlay(samples.images[i], samples.weights[i], samples.grid, scale)
                ),
                "reward": _number(samples.rewards[i]),
                "advantage": _number(samples.advantages[i], signed=True),
                "trend": _trend(samples.advantages[i]),
            }
            for i in group
        ]
        low, high = (f"{bound:.2f}" for bound in scale)
        return {"step": step, "prompt": samples.prompts[start], "images": images, "low": low, "high": high}
    return None


def _widest_group(samples: Samples) -> int:
    """Index of the first image of the group whose rewards spread most: there the weights have work to do."""
    starts = range(0, len(samples.images), samples.columns)
    spreads = []
    for start in starts:
        rewards = [r for r in samples.rewards[start : start + samples.columns] if r is not None]
        spreads.append(max(rewards) - min(rewards) if rewards else 0.0)
    return starts[int(np.argmax(spreads))]


def _progress(run: RunRecord) -> list[dict[str, Any]]:
    """The first saved groups at the beginning and at the end of the run."""
    steps = run.sample_steps
    rows = []
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        samples = run.samples(step)
        if samples is None:
            continue
        for start in range(0, len(samples.images), samples.columns)[:2]:
            members = range(start, min(start + samples.columns, len(samples.images)))[:_MAX_GROUP_IMAGES]
            images = [
                {"uri": charts.data_uri(samples.images[i]), "reward": _number(samples.rewards[i])} for i in members
            ]
            rows.append({"step": step, "prompt": samples.prompts[start], "images": images})
    return rows


def _number(value: float | None, signed: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.2f}" if signed else f"{value:.2f}"


def _trend(value: float | None) -> str:
    if not value:
        return "flat"
    return "up" if value > 0 else "down"


def _plain(value: Any) -> str:
    """A configuration value in one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
