"""Two processes over gloo, started as users start them, against one process.

The one group of every step is split between the processes. Sums are taken in another order than by one process, so
float32 numbers differ in the last digits: by about 1e-6 of their size in what is logged, by 1e-7 in the weights, which
training moves by 9e-3. The bounds below are about ten times that.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy
from trl import GRPOTrainer

from distributed_worker import train
from stage_grpo.gathering import ShardedTrainer
from stage_grpo.heldout_record import read_records
from stage_grpo.policy import load_policy

ROOT = Path(__file__).parents[1]
MODES = {"ddp": 1.0, "zero2": 1.0, "zero3": 0.5, "fsdp2": 0.5}
"""File in configs/accelerate -> share of the weights that each of two processes holds."""
SAME = (
    "loss", "grad_norm", "learning_rate", "num_tokens", "reward", "rewards/brightness/std", "entropy_reward", "kl",
    "kl_weighted", "entropy", "entropy/policy", "entropy/reference", "similarity/mean", "similarity/std",
    "advantage_weights/mean", "kl_weights/mean", "unique_images",
)  # fmt: skip

STRAIGHT = {
    "save_strategy": "steps",
    "save_steps": 2,  # those that are looked at: steps 2 and 4
    "sync_ref_model": True,
    "ref_model_sync_steps": 2,
    "ref_model_mixup_alpha": 0.25,
    "eval_strategy": "steps",
    "eval_steps": 4,
}
LORA = {"lora": True, "max_steps": 2}
BF16 = {"bf16": True, "max_steps": 1}
WHOLE = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 4}


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    """The same runs in one process, without accumulation."""
    folder = tmp_path_factory.mktemp("alone")
    train(checkpoint, folder / "straight", heldout=True, **WHOLE, **STRAIGHT)
    train(checkpoint, folder / "lora", **WHOLE, **LORA)
    return folder


def launch(mode, jobs):
    """Start two processes as the README does, on a machine taken to have no GPU and no compiler."""
    command = ["--config_file", f"configs/accelerate/{mode}.yaml", "--num_processes", "2", "--main_process_port", "0"]
    command += ["tests/distributed_worker.py"]
    surroundings = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "CXX": "/bin/false",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH")))),
    }
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *command, json.dumps(jobs)],
        cwd=ROOT,
        env={**os.environ, **surroundings},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "Loading" not in line)[-9000:]


def logged(folder, key="reward"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if key in row}


def difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a.keys() & b.keys())


def check_logs(split, alone):
    assert logged(split).keys() == logged(alone).keys()
    for step, row in logged(alone).items():
        for name in SAME:
            assert logged(split)[step][name] == pytest.approx(row[name], rel=1e-5, abs=1e-6), (step, name)
    assert logged(split)[1]["kl"] == 0, "the reference is another policy than the one trained from"


def check_evaluation(split, alone):
    """A rollout outside training. Not compared: transformers takes ``eval_loss`` from the first process alone."""
    (step, row), (_, expected) = (*logged(split, "eval_reward").items(), *logged(alone, "eval_reward").items())
    assert step == 4
    for name in ("eval_reward", "eval_kl", "eval_entropy", "eval_similarity/mean", "eval_rewards/brightness/std"):
        assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


def check_heldout(split, alone):
    """Each process drew three of the six images; the best policy is whole and the one that was scored."""
    for step in (0, 4):
        folder = Path("heldout", f"step-{step:06d}", "images")
        paths = sorted(path.relative_to(alone) for path in (alone / folder).rglob("samples/*.png"))
        assert len(paths) == 6
        for path in paths:
            assert Image.open(split / path).tobytes() == Image.open(alone / path).tobytes(), path
        sizes = [json.loads((run / folder / "generation.json").read_text())["batch_size"] for run in (alone, split)]
        assert sizes == [6, 3]
    records = [[replace(record, seconds=0) for record in read_records(run)] for run in (split, alone)]
    assert records[0] == records[1] and [record.step for record in records[0]] == [0, 4]
    kept = [load_policy(str(run / "best")).state_dict() for run in (split, alone)]
    assert kept[0].keys() == kept[1].keys() and difference(*kept) < 1e-6


def check_bfloat16(folder):
    """Policy and reference compute alike, and what they return is not rounded to bfloat16."""
    row = logged(folder)[1]
    assert row["kl"] == 0
    assert row["entropy"] == pytest.approx(row["entropy/reference"], abs=1e-6)


def check_weights(checkpoint, split, alone):
    start, after = load_file(checkpoint + "/model.safetensors"), load_file(alone / "model.safetensors")
    assert difference(start, after) > 5e-3
    saved = load_file(split / "model.safetensors")
    assert after.keys() <= saved.keys() <= after.keys() | {"lm_head.weight"}  # other tools go by these names
    assert difference(saved, after) < 1e-6
    policies = [dict(load_policy(folder).named_parameters()) for folder in (split, alone)]
    assert policies[0].keys() == policies[1].keys()
    assert difference(*policies) < 1e-6
    assert {weight.dtype for weight in saved.values()} == {torch.float32}


def check_reference(checkpoint, split, alone):
    """At steps 2 and 4 it became 0.75 x itself + 0.25 x the policy."""
    start = load_file(checkpoint + "/model.safetensors")
    second, fourth = (load_file(split / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4))
    reference = load_file(split / "reference.safetensors")
    assert start.keys() <= reference.keys()
    mixed = {name: 0.75 * (0.75 * start[name] + 0.25 * second[name]) + 0.25 * fourth[name] for name in start}
    assert difference(mixed, reference) < 1e-7
    assert difference(start, reference) > 1e-3
    assert difference(load_file(alone / "reference.safetensors"), reference) < 1e-6


def check_resumed(resumed, straight):
    """To the bit, also the reference synced before: within a mode the order of all sums is the same."""
    assert logged(resumed).keys() == {3, 4}
    for step, row in logged(resumed).items():
        assert {name: row[name] for name in SAME} == {name: logged(straight)[step][name] for name in SAME}
    for file in ("model.safetensors", "reference.safetensors"):
        assert difference(load_file(resumed / file), load_file(straight / file)) == 0


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one(checkpoint, alone, tmp_path, mode):
    straight, resumed, lora, bf16 = (tmp_path / name for name in ("straight", "resumed", "lora", "bf16"))
    job = {"checkpoint": checkpoint, **SPLIT}
    jobs = [
        {**job, **STRAIGHT, "folder": str(straight), "heldout": True},
        {**job, **STRAIGHT, "folder": str(resumed), "resume": f"{straight}/checkpoint-2"},
        {**job, **LORA, "folder": str(lora)},
        {**job, **BF16, "folder": str(bf16)},
    ]
    launch(mode, jobs)
    check_logs(straight, alone / "straight")
    check_evaluation(straight, alone / "straight")
    check_heldout(straight, alone / "straight")
    check_weights(checkpoint, straight, alone / "straight")
    check_reference(checkpoint, straight, alone / "straight")
    check_resumed(resumed, straight)
    check_logs(lora, alone / "lora")
    adapters = [load_file(folder / "lora" / "adapter_model.safetensors") for folder in (tmp_path, alone)]
    assert adapters[0].keys() == adapters[1].keys()
    assert difference(*adapters) < 1e-7
    check_bfloat16(bf16)
    for folder in (straight, resumed, lora, bf16):
        assert float((folder / "share_held.txt").read_text()) == pytest.approx(MODES[mode], abs=0.01)
        assert (folder / "decoders.txt").read_text() == "LlamaDecoder"  # not the library's slow step
    # The first process saw the first half of the group, the same images as alone.
    one, two = (json.loads((n / "straight/samples/step_000002.json").read_text()) for n in (alone, tmp_path))
    assert two["rewards"] == pytest.approx(one["rewards"][:4], abs=1e-4)


def sharded_by(plugin):
    """A trainer of which accelerate has just been set up."""
    trainer = object.__new__(ShardedTrainer)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with mock.patch.object(GRPOTrainer, "create_accelerator_and_postprocess"):
        trainer.create_accelerator_and_postprocess()


def test_the_first_version_of_fsdp_is_refused():
    with pytest.raises(ValueError, match=r"fsdp_version=1 is not supported.*set fsdp_version: 2"):
        sharded_by(SimpleNamespace(fsdp_version=1, mixed_precision_policy=None))


def test_fsdp2_computes_in_bfloat16_but_does_not_round_what_it_returns():
    asked = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy=asked)
    sharded_by(plugin)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16, torch.float32)
