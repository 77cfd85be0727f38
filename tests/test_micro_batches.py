"""A step in passes of fewer images is the same step; the size by the memory that is free."""

import dataclasses
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.utils import split_tensor_dict

from conftest import PROMPTS
from stage_grpo import devices, micro_batched, trl_seams
from stage_grpo.config import parse_config
from stage_grpo.devices import free_bytes, num_cores
from stage_grpo.micro_batched import choose_size, split_again
from stage_grpo.micro_batches import in_micro_batches
from stage_grpo.planning.memory import components
from stage_grpo.planning.micro_batch import MARGIN
from stage_grpo.planning.plan import describe, levers, make_plan
from stage_grpo.planning.sizes import measure, sizes_of
from stage_grpo.policy import load_policy, load_tokenizer
from stage_grpo.policy.janus import JanusPolicy
from stage_grpo.rewards.batching import choose_batch_size
from stage_grpo.rollout import memory_budget
from stage_grpo.shapes import tiny
from test_trainer import LOSS_TYPES, config, dataset, logged, loss_and_gradients, scored_batch, trainer_for

SETTINGS = {
    "one pass a step": {"entropy_loss_weight": 0.5},
    "a rollout for two steps of two passes": {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4,
        "loss_type": "dapo",
    },
    "two iterations": {"num_iterations": 2, "use_bias_correction_kl": True},
}  # fmt: skip
MEASURED = ("seconds/", "memory/", "step_time", "images_per_second", "train_", "total_flos")
"""What measures the machine."""
EXTREMES = ("clip_ratio/low_min", "clip_ratio/high_max")
"""Of one pass each, as TRL logs them."""
RESUMING = "stage_grpo.resuming"


def trained(checkpoint, folder, monkeypatch, **changes):
    """A trainer after its run, the images of its rollouts, and what it logged."""
    codes, sample = [], trl_seams.sample_images

    def remember(prompts, trainer):
        found = sample(prompts, trainer)
        codes.append((list(prompts), found["completion_ids"]))
        return found

    monkeypatch.setattr(trl_seams, "sample_images", remember)
    # Plain gradient descent: Adam divides by gradients that are nothing but rounding.
    values = {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.5,
        "guidance_scale": 1.0,
        **changes,
    }
    trainer = trainer_for(checkpoint, folder, **values)
    resume = values.get("save_strategy") == "steps"
    trainer.train(resume_from_checkpoint=resume or None)
    monkeypatch.setattr(trl_seams, "sample_images", sample)
    rows = [row for row in logged(folder) if "train_runtime" not in row]
    return trainer, codes, [{k: v for k, v in row.items() if not k.startswith((*MEASURED, *EXTREMES))} for row in rows]


def assert_same_run(one, other, start):
    """Logged numbers and weights, but for rounding: sums in another order were seen to move a norm by 1.3e-6."""
    assert len(one[2]) == len(other[2]) >= 3
    for row, same in zip(one[2], other[2]):
        assert row.keys() == same.keys() and {"loss", "grad_norm", "kl", "entropy"} <= row.keys()
        # Entropies of 6 nats have steps of 5e-7.
        bounds = {name: 6e-6 if name == "grad_norm" else 1e-6 for name in same}
        assert row == {name: pytest.approx(value, rel=bounds[name], abs=1e-6) for name, value in same.items()}
    first, second = (torch.cat([p.detach().flatten() for p in run[0].model.parameters()]) for run in (one, other))
    assert (first - start).norm() > 0.01
    assert (first - second).norm() <= 1e-6 * first.norm()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The tiny Janus of conftest.py with images of four tokens."""
    tokenizer = tiny.build_text_tokenizer()
    layout = tiny.build_config(tokenizer)
    layout.vq_config.num_patches = 2
    layout.vision_config.image_size, layout.vision_config.num_image_tokens = 2 * layout.vision_config.patch_size, 4
    torch.manual_seed(0)
    policy = JanusPolicy(layout)
    with torch.no_grad():
        policy.get_output_embeddings().weight.normal_(0, 0.3)
        for parameter in policy.backbone.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.08)
    folder = tmp_path_factory.mktemp("small")
    tiny.save(policy, tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def start(small):
    return torch.cat([p.detach().flatten() for p in load_policy(small).parameters()])


@pytest.mark.parametrize(("name", "size"), zip(SETTINGS, (2, 1, 2), strict=True))
def test_a_run_in_micro_batches_is_the_run_without(small, tmp_path, monkeypatch, start, name, size):
    whole = trained(small, tmp_path / "whole", monkeypatch, **SETTINGS[name])
    split = trained(small, tmp_path / "split", monkeypatch, micro_batch_size=size, **SETTINGS[name])
    assert split[0].args.per_device_train_batch_size == size
    assert split[1] == whole[1] and len(whole[1]) == (3 if name == "one pass a step" else 2)
    assert_same_run(split, whole, start)


def test_every_loss_of_trl_is_the_mean_over_micro_batches(small, tmp_path):
    """One rollout, its policy moved away since; weights of tokens, KL and entropy loss on."""
    changes = {"entropy_loss_weight": 0.5, "importance_sampling_level": "sequence"}
    whole = trainer_for(small, tmp_path, **changes)
    batch = scored_batch(whole)
    split = trainer_for(small, tmp_path, micro_batch_size=2, **changes)
    split.model.load_state_dict(whole.model.state_dict())
    split.model.train()
    split.current_gradient_accumulation_steps = split.args.gradient_accumulation_steps

    def summed(model, rows):
        return sum(split._compute_loss(model, part) for part in split_tensor_dict(rows, 4))

    for loss_type in LOSS_TYPES:
        whole.loss_type = split.loss_type = loss_type
        loss, gradients = loss_and_gradients(whole, batch, whole._compute_loss)
        same, summed_gradients = loss_and_gradients(split, batch, summed)
        torch.testing.assert_close(same, loss, atol=1e-6, rtol=0)
        assert gradients.keys() == summed_gradients.keys() and len(gradients) > 20
        for name, gradient in gradients.items():
            atol = 1e-5 * gradient.abs().max().item() + 1e-9
            torch.testing.assert_close(summed_gradients[name], gradient, atol=atol, rtol=0)


def test_a_run_continues_in_micro_batches_of_another_size(small, tmp_path, monkeypatch, start, caplog):
    """At steps 1 and 3 half of a rollout is still to come."""
    changes = {**SETTINGS["a rollout for two steps of two passes"], "save_strategy": "steps", "save_steps": 1}
    whole = trained(small, tmp_path / "whole", monkeypatch, **changes, max_steps=4)
    for step, size, first, name in ((1, 1, "whole", "split"), (3, None, "split", "whole again")):
        shutil.copytree(tmp_path / first, tmp_path / name)
        for later in range(step + 1, 5):
            shutil.rmtree(tmp_path / name / f"checkpoint-{later}")
        caplog.clear()
        again = trained(small, tmp_path / name, monkeypatch, **changes, max_steps=4, micro_batch_size=size)
        assert f"micro_batch_size: {1 if size is None else None} -> {size}" in caplog.text
        assert not any("per_device" in record.getMessage() for record in caplog.records if record.name == RESUMING)
        assert again[1] == whole[1][(step + 1) // 2 :]
        assert_same_run(again, whole, start)
        assert again[0]._step == (8 if size is None else 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 3}, r"micro_batch_size=3 does not divide .*=8; use 1, 2, 4, 8, or auto"),
        ({"micro_batch_size": "some"}, r"micro_batch_size='some' does not divide"),
        ({"micro_batch_size": 16}, r"micro_batch_size=16 does not divide"),
        ({"micro_batch_size": 0}, r"micro_batch_size=0 does not divide"),
        ({"micro_batch_size": True}, r"micro_batch_size=True does not divide"),
        (
            {"micro_batch_size": 4, "top_entropy_quantile": 0.2},
            r"micro_batch_size=4 does not go with top_entropy_quan",
        ),
    ],
)
def test_sizes_that_change_the_step_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_the_command_line_takes_a_number_or_auto():
    words = ["--output_dir", "out", "--per_device_train_batch_size", "8", "--num_generations", "4"]
    for word, value in (("4", 4), ("auto", "auto")):
        assert parse_config("stage train", [*words, "--micro_batch_size", word]).micro_batch_size == value


def test_deepspeeds_counts_are_renewed(tmp_path):
    args = config(tmp_path, gradient_accumulation_steps=3)
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    args.deepspeed = {**dict.fromkeys(names, "auto"), "zero_optimization": {"stage": 2}}
    small = in_micro_batches(args, 2)
    micro_batched._tell_deepspeed(small)
    assert small.deepspeed_plugin.deepspeed_config == small.hf_deepspeed_config.config
    assert [small.hf_deepspeed_config.config[name] for name in names] == [24, 2, 12]
    assert args.gradient_accumulation_steps == 3 and args.deepspeed["train_batch_size"] == "auto"


def test_a_rollout_is_cut_again_in_order():
    rows = {"codes": torch.arange(24).view(12, 2), "num_items_in_batch": torch.tensor(7), "old": None}
    again = split_again(split_tensor_dict(rows, 2), 6)
    assert [part["codes"][:, 0].tolist() for part in again] == [[0, 2], [4, 6], [8, 10], [12, 14], [16, 18], [20, 22]]
    assert all(part["num_items_in_batch"] == 7 and part["old"] is None for part in again)


# By the memory that is free


@pytest.fixture
def chosen(checkpoint, tmp_path, monkeypatch, caplog):
    """The size chosen at so many free bytes, and what was logged."""
    policy = load_policy(checkpoint)
    tokenizer = load_tokenizer(policy)

    def choose(free, others=(), **changes):
        args = config(tmp_path, per_device_train_batch_size=12, micro_batch_size="auto", use_cpu=True, **changes)
        monkeypatch.setattr(micro_batched, "free_bytes", lambda device: int(free))
        monkeypatch.setattr(micro_batched, "gather_object", lambda found: [*found, *others])
        caplog.clear()
        return choose_size(args, policy, dataset(), tokenizer), caplog.text

    return choose


def test_free_memory_is_all_that_could_be_taken(monkeypatch):
    """3 that nobody holds, and 12 that PyTorch holds for later; of a machine also the cache of files."""
    gpu = {"mem_get_info": (3, 80), "memory_reserved": 20, "memory_allocated": 8}
    for name, value in gpu.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: SimpleNamespace(available=40, free=2))
    assert [free_bytes(torch.device(name)) for name in ("cuda", "cpu")] == [15, 40]
    assert memory_budget(torch.device("cuda")) == 15 // 2
    assert [choose_batch_size(None, 1, name) for name in ("cuda:0", "cpu")] == [15 // 4, 40 // 4]


def test_the_largest_size_that_fits_is_chosen(chosen, checkpoint, tmp_path):
    args = config(tmp_path, per_device_train_batch_size=12, use_cpu=True)
    longest = max(map(len, load_policy(checkpoint).encode_prompts(load_tokenizer(load_policy(checkpoint)), PROMPTS)))
    args.model = checkpoint
    for size in (3, 12):
        args.per_device_train_batch_size = args.num_generations = size
        plan = make_plan(args, 1, parallel="ddp", num_prompt_tokens=longest)
        plan = dataclasses.replace(plan.setting, mixed=False)
        there = {part.name: part.size for part in components(plan) if part.phase == "always"}
        passes = sum(part.size for part in components(plan) if part.phase == "update")
        needed = there["gradients"] + there["optimizer"] + there["reference policy"] + passes
        found, told = chosen(needed / MARGIN + 1)
        assert found == size
        assert (
            f"micro_batch_size auto: {size} of 12 images at a time x {12 // size}, about {needed / 1e9:.1f} GB" in told
        )
        smaller = {3: 2, 12: 6}[size]
        assert chosen(needed / MARGIN - 1)[0] == smaller


def test_recomputing_activations_makes_room(chosen):
    sizes = [chosen(7.5e7, gradient_checkpointing=value)[0] for value in (False, True)]
    assert sizes[0] < sizes[1]


def test_processes_agree_on_the_smallest(chosen):
    found, told = chosen(1e12, others=[3, 6])
    assert found == 3 and "3 of 12 images at a time x 4" in told


def test_where_nothing_fits_it_is_one_and_a_warning(chosen):
    found, told = chosen(1e6)
    assert found == 1 and "1 of 12 images at a time may not fit" in told and "set gradient_checkpointing: true" in told
    assert "gradient_checkpointing" not in chosen(1e6, gradient_checkpointing=True)[1]
    assert chosen(1e12, others=[0])[0] == 1


def test_a_trainer_takes_the_size_that_was_chosen(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(micro_batched, "choose_size", lambda *_: 2)
    trainer = trainer_for(checkpoint, tmp_path, micro_batch_size="auto", gradient_accumulation_steps=3)
    counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "micro_batch_size")
    assert [getattr(trainer.args, name) for name in counts] == [2, 12, 12, 2]
    assert trainer.args.generation_batch_size == 24
    assert next(iter(trainer.get_train_dataloader())).__len__() == 24


RECIPE = str(Path(__file__).parents[1] / "configs/train/geneval_1b.yaml")


def plan_of(*words, **options):
    return make_plan(parse_config("stage plan", [RECIPE, "--gradient_checkpointing", "false", *words]), **options)


def test_the_plan_counts_in_micro_batches():
    whole, split = plan_of(), plan_of("--micro_batch_size", "2")
    told = plan_of("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")
    assert split.parts == told.parts and split.work == told.work and split.peak < whole.peak
    assert split.work == whole.work
    assert "micro_batch_size 2: a step takes 4 x 2 images on each GPU" in describe(split)
    assert dict(levers(whole))["--micro_batch_size 4"] == plan_of("--micro_batch_size", "4").peak


def test_the_plan_chooses_as_a_run_would():
    sizes = [plan_of("--micro_batch_size", "auto", gpu_memory=gb).setting.config.micro_batch_size for gb in (12, 80)]
    assert sizes[0] < sizes[1] == 8


def test_sizes_in_memory_are_those_of_the_weights(checkpoint):
    policy = load_policy(checkpoint)
    found, counted = sizes_of(policy), measure(policy)
    assert all(p.is_meta for p in found.policy.parameters())
    assert (found.parts, found.layer, found.head_matmul) == (counted.parts, counted.layer, counted.head_matmul)


def test_cores_are_those_that_a_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert num_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert num_cores() == 64
