"""The demonstration: score a policy, train it, score it again on the same prompts and seeds, report."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from stage_grpo.benchmarks import GRADED, STRICT
from stage_grpo.config import StageConfig, parse_config
from stage_grpo.data import load_rows
from stage_grpo.evaluation.evaluate import evaluate
from stage_grpo.evaluation.scores import OVERALL, Scores, compare, format_comparison
from stage_grpo.generation.generate import generate
from stage_grpo.pages.report import write_demo_report
from stage_grpo.policy import load_policy, load_tokenizer
from stage_grpo.run_folder import write_atomically
from stage_grpo.run_record import read_run
from stage_grpo.training import train


@dataclass(frozen=True)
class DemoConfig:
    """What ``stage demo`` runs.

    Raises:
        ValueError: If a number is out of range.
    """

    recipe: str = field(default="configs/shapes/stage.yaml", metadata={"help": "Training configuration."})
    out: str = field(default="outputs/demo", metadata={"help": "Folder to write; what it holds is replaced."})
    prompts: str = field(default="assets/shapes/heldout.jsonl", metadata={"help": "Held-out prompts to score."})
    benchmark: str = field(default="shapes", metadata={"help": "How images are scored."})
    seed: int = field(default=0, metadata={"help": "Seed of the training."})
    max_steps: int | None = field(default=None, metadata={"help": "Training steps; by default the configuration's."})
    minutes: float = field(default=4.5, metadata={"help": "Training ends early to finish in about this time."})

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.minutes <= 0 or self.seed < 0:
            raise ValueError(f"minutes={self.minutes} must be above 0 and seed={self.seed} at least 0")


class Deadline(TrainerCallback):
    """Ends training after the step during which a moment of ``time.monotonic`` passes."""

    def __init__(self, moment: float):
        self.moment = moment

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when it is late."""
        if time.monotonic() > self.moment:
            control.should_training_stop = True


def run_demo(config: DemoConfig) -> str:
    """Run the demonstration.

    Args:
        config: What to run.

    Returns:
        The table of both sides and the path of the report, to print.

    Raises:
        ValueError: If a file it needs is missing, a value is wrong, or the training was stopped.
    """
    start, out = time.monotonic(), Path(config.out)
    words = [config.recipe, "--output_dir", str(out / "run"), "--seed", str(config.seed)]
    words += [] if config.max_steps is None else ["--max_steps", str(config.max_steps)]
    training = parse_config("stage demo", words)
    for name in ("before", "run", "after"):
        shutil.rmtree(out / name, ignore_errors=True)
    before = _score(config, str(training.model), training, out / "before")
    evaluated = time.monotonic()
    # The second evaluation takes as long as the first; a tenth on top leaves room for the report.
    deadline = start + 60 * config.minutes - 1.1 * (evaluated - start)
    result = train(training, [Deadline(deadline)])
    if result.stopped_by is not None:
        raise ValueError(
            f"{result.stopped_by} ended the training after step {result.step}, so there is nothing to compare; run "
            "stage demo again"
        )
    trained = time.monotonic()
    after = _score(config, str(out / "run"), training, out / "after")
    phases = {
        "evaluation before": evaluated - start,
        "training": trained - evaluated,
        "evaluation after": time.monotonic() - trained,
    }
    report = write_demo_report(out / "report.html", before, after, out / "run", out / "before", out / "after", phases)
    write_atomically(out / "summary.json", json.dumps(_summary(config, before, after, out / "run", phases), indent=2))
    return f"{format_comparison(before, after)}\n\nreport: {report}"


def _score(config: DemoConfig, model: str, training: StageConfig, out: Path) -> Scores:
    """Generate images of the held-out prompts and score them; the seed is the same on both sides."""
    policy = load_policy(model)
    rows, template = load_rows(config.prompts), training.prompt_template
    generate(policy, load_tokenizer(policy), rows, out, training.sampling, prompt_template=template)
    scores = evaluate(config.benchmark, out)
    scores.save(out / "scores.json")
    return scores


def _summary(config: DemoConfig, before: Scores, after: Scores, run: Path, phases: dict[str, float]) -> dict[str, Any]:
    gain = compare(before, after, STRICT)[OVERALL]
    steps = read_run(run).num_steps
    sides = {
        name: {"overall": scores.scores[STRICT][OVERALL], "reward": scores.scores[GRADED][OVERALL]}
        for name, scores in (("before", before), ("after", after))
    }
    return {
        **sides,
        "gain": {"overall": gain.value, "ci95": [gain.low, gain.high], "num_images": after.num_images},
        "seed": config.seed,
        "steps": steps,
        "seconds": sum(phases.values()),
        "phases": phases,
    }
