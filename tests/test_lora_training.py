"""LoRA in training: exact resume, a reference that costs nothing, and where dropout does not apply."""

import gc

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from stage_grpo.planning.setting import LORA_TARGETS
from stage_grpo.policy import load_policy
from test_trainer import logged, trainer_for

WEIGHTS = "adapter_model.safetensors"
TIMINGS = ("seconds/", "memory/", "images_per_second", "step_time")


def lora(**changes):
    return LoraConfig(r=4, target_modules=LORA_TARGETS, **changes)


def four_steps(checkpoint, folder, resume_from=None):
    """Train to step 4 with dropout; gives the logged rows without timings, and all weights."""
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "peft_config": lora(lora_dropout=0.5)}
    stage = trainer_for(checkpoint, folder, **changes)
    stage.train(resume_from_checkpoint=resume_from)
    rows = [row for row in logged(folder) if "loss" in row]
    numbers = [{name: row[name] for name in row if not name.startswith(TIMINGS)} for row in rows]
    return numbers, {name: p.detach().clone() for name, p in stage.model.named_parameters()}


@pytest.fixture(scope="module")
def straight(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, *four_steps(checkpoint, folder)


def test_a_resumed_run_equals_the_straight_one(checkpoint, straight, tmp_path):
    folder, rows, weights = straight
    rows_again, resumed = four_steps(checkpoint, tmp_path, str(folder / "checkpoint-2"))
    assert [row["step"] for row in rows_again] == [3, 4] and {"loss", "reward", "kl", "grad_norm"} <= rows[0].keys()
    assert rows_again == rows[2:]
    assert resumed.keys() == weights.keys() and all(torch.equal(t, weights[n]) for n, t in resumed.items())
    at_two, at_four = (load_file(path / WEIGHTS) for path in (folder / "checkpoint-2", tmp_path / "checkpoint-4"))
    assert all(not torch.equal(tensor, at_two[name]) for name, tensor in at_four.items())


def test_kl_is_zero_at_the_first_step_with_dropout(straight):
    first, second = straight[1][:2]
    assert first["kl"] == 0.0 and first["entropy/gap"] < 1e-5 and second["kl"] > 1e-8


def num_parameters_alive():
    """Numbers held by parameters anywhere in this process."""
    gc.collect()
    found = {id(thing): thing.numel() for thing in gc.get_objects() if type(thing) is torch.nn.Parameter}
    return sum(found.values())


def test_the_reference_costs_no_second_model(checkpoint, tmp_path):
    before = num_parameters_alive()
    policy = load_policy(checkpoint)
    base = num_parameters_alive() - before
    assert base == sum(p.numel() for p in policy.parameters()) > 1.6e6
    del policy
    stage = trainer_for(checkpoint, tmp_path / "lora", peft_config=lora())
    adapters = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    assert stage.ref_model is None
    assert num_parameters_alive() - before == base + adapters
    del stage
    full = trainer_for(checkpoint, tmp_path / "full")
    assert full.ref_model is not None and num_parameters_alive() - before == 2 * base


def test_the_configuration_alone_makes_adapters(checkpoint, tmp_path):
    stage = trainer_for(checkpoint, tmp_path, use_peft=True, lora_r=5, lora_alpha=7)
    chosen = stage.model.peft_config["default"]
    assert stage.ref_model is None and (chosen.r, chosen.lora_alpha, chosen.lora_dropout) == (5, 7, 0)
    assert all("lora_" in name for name, parameter in stage.model.named_parameters() if parameter.requires_grad)


def moved(checkpoint, folder, **changes):
    """A trainer whose adapters are no longer 0, and one batch that it has sampled and scored in training mode."""
    stage = trainer_for(checkpoint, folder, peft_config=lora(**changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in stage.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
    stage.model.train()
    rows = [dict(row) for row in stage.train_dataset.select(range(2)) for _ in range(4)]
    return stage, stage._generate_and_score_completions(rows)


@torch.no_grad()
def log_probabilities(policy, batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    features = policy.head_features(ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1))
    logps = torch.log_softmax(policy.image_logits(features), dim=-1)
    return logps.gather(-1, batch["completion_ids"][..., None]).squeeze(-1)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_rollout_and_reference_run_without_dropout(checkpoint, tmp_path, dropout):
    stage, batch = moved(checkpoint, tmp_path, lora_dropout=dropout)
    assert stage.model.training
    untouched = log_probabilities(load_policy(checkpoint), batch)
    torch.testing.assert_close(batch["ref_per_token_logps"], untouched, atol=1e-5, rtol=0)
    policy = stage.model.get_base_model()
    with_dropout = log_probabilities(policy, batch)
    stage.model.eval()
    without_dropout = log_probabilities(policy, batch)
    torch.testing.assert_close(batch["sampling_per_token_logps"], without_dropout, atol=1e-5, rtol=0)
    assert (without_dropout - untouched).abs().max() > 0.1
    assert ((with_dropout - without_dropout).abs().max() > 0.1) == (dropout > 0)
