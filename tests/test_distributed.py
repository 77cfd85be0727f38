"""Two processes over gloo, with the one group of a step split between them, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("distributed_worker.py")
SAME = ("reward", "rewards/brightness/std", "entropy_reward", "kl", "kl_weighted", "similarity/mean", "similarity/std")


def train(checkpoint, folder, processes, images_per_process):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = launcher if processes > 1 else [sys.executable]
    done = subprocess.run(
        [*command, str(WORKER), checkpoint, str(folder), str(images_per_process)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row], load_file(folder / "model.safetensors")


def test_a_group_split_over_two_processes_equals_one_process(checkpoint, tmp_path):
    alone, weights = train(checkpoint, tmp_path / "one", 1, 8)
    split, split_weights = train(checkpoint, tmp_path / "two", 2, 4)
    assert len(alone) == len(split) == 2
    for one, two in zip(alone, split):
        for name in SAME:
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
    start = load_file(Path(checkpoint) / "model.safetensors")
    moved = max((weights[name] - start[name]).abs().max() for name in weights)
    assert moved > 1e-3
    for name in weights:
        torch.testing.assert_close(split_weights[name], weights[name], atol=1e-5, rtol=0)
    # The first process saw the first half of the group, the same images as alone.
    one, two = (json.loads((tmp_path / n / "samples/step_000002.json").read_text()) for n in ("one", "two"))
    assert two["rewards"] == pytest.approx(one["rewards"][:4], abs=1e-4)
