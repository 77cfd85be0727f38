"""One job in a process of its own: train, test with the final policy, and write ``result.json`` last.

    python -m stage_grpo.ablation.worker FOLDER

It ends by itself when the process that started it is gone, and two of them never work in one folder.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from stage_grpo.ablation.grid import HeldoutTest
from stage_grpo.ablation.job import CONFIG, LOG, PROMPTS, RESULT, SCORES, TEST, read_result
from stage_grpo.ablation.plan import test_sampling
from stage_grpo.config import StageConfig, parse_config
from stage_grpo.guard_record import ROLLED_BACK, read_guard
from stage_grpo.run_folder import write_atomically

STOPPED = 75
"""Exit code of a job that was told to stop and can be continued."""
_TRAINED, _LOCK = "trained.json", ".lock"


def run_job(folder: Path) -> None:
    """Do a job, or what is left of it.

    Args:
        folder: Folder of the job.

    Raises:
        ValueError: If the training or the test cannot be done, or if the guard stopped the training.
        SystemExit: With code ``STOPPED`` if a signal ended the training.
    """
    content = json.loads((folder / TEST).read_text(encoding="utf-8"))
    config = parse_config("stage ablate", [str(folder / CONFIG)])
    seconds: dict[str, float] = {}
    if content["train"]:
        start = time.monotonic()
        _train(config, folder)
        seconds["train"] = time.monotonic() - start
    if not (folder / SCORES).is_file():
        start = time.monotonic()
        _score(config, HeldoutTest(**content["test"]), _tested(config, folder, content["train"]), folder)
        seconds["test"] = time.monotonic() - start
    if content["train"] and not content["keep_weights"]:
        _drop_weights(folder)
    result = {"steps": config.max_steps if content["train"] else 0, "seconds": seconds, "threads": _threads()}
    write_atomically(folder / RESULT, json.dumps(result, indent=2) + "\n")


def _train(config: StageConfig, folder: Path) -> None:
    """Train, or go on from the newest checkpoint; without one, what a killed run left is swept away."""
    from stage_grpo.run_checkpoints import newest_whole
    from stage_grpo.training import train

    if (folder / _TRAINED).is_file():
        return
    _check_guard(config, folder)
    checkpoint, _ = newest_whole(folder)
    if checkpoint is None:
        _sweep(folder)
    config.resume = "never" if checkpoint is None else "auto"
    result = train(config)
    if result.stopped_by is not None:
        _check_guard(config, folder)
        sys.exit(STOPPED)
    write_atomically(folder / _TRAINED, json.dumps({"step": result.step}) + "\n")


def _check_guard(config: StageConfig, folder: Path) -> None:
    """Refuse a training that its guard stopped before its end: with fewer steps it does not compare."""
    for record in read_guard(folder):
        if record.action == "stop" and record.step < config.max_steps:
            raise ValueError(
                f"the guard stopped it at step {record.step} of {config.max_steps}: {record.message}; change what the "
                "message names, or set guard: warn"
            )


def _tested(config: StageConfig, folder: Path, is_trained: bool) -> str:
    """The policy to test: with averaged weights these, as held-out tests during training do."""
    if not is_trained:
        return str(config.model)
    return str(folder if config.ema_decay is None else folder / "ema")


def _score(config: StageConfig, test: HeldoutTest, model: str, folder: Path) -> None:
    import torch

    from stage_grpo.benchmark_rows import benchmark_rows
    from stage_grpo.benchmarks import get_benchmark
    from stage_grpo.evaluation.evaluate import evaluate
    from stage_grpo.generation.generate import generate
    from stage_grpo.policy import load_policy, load_tokenizer

    policy: Any = load_policy(model, config.dtype, config.attn_implementation)
    policy = policy.to("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu").eval()
    benchmark = get_benchmark(test.benchmark)
    generate(
        policy,
        load_tokenizer(policy),
        benchmark_rows(benchmark, test.prompts),
        folder / "images",
        test_sampling(config, test),
        num_images=test.num_images,
        prompt_template=config.prompt_template,
        layout=benchmark.layout,
        model=model,
    )
    # In the space of the image codes: that of CLIP depends on which weights a machine has.
    scores = evaluate(
        test.benchmark, folder / "images", prompts=test.prompts, num_images=test.num_images, diversity_space="codes"
    )
    scores.save(folder / SCORES)


def _sweep(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name in (CONFIG, TEST, PROMPTS, _LOCK, LOG):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _drop_weights(folder: Path) -> None:
    """Delete what is large: the test is done, and a grid has many runs."""
    for path in [*folder.glob("checkpoint-*"), folder / ROLLED_BACK, folder / "best", folder / "ema"]:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("*.safetensors"):
        path.unlink()


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _end_with_parent() -> None:
    """Send SIGTERM to this process when its parent is gone, which closes the pipe that is standard input."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Do the job whose folder is the first argument."""
    folder = Path(sys.argv[1])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with FileLock(folder / _LOCK):
        if read_result(folder) is None:
            run_job(folder)


if __name__ == "__main__":
    main()
