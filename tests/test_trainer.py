import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from conftest import PROMPTS, save_untrained
from stage_grpo import devices, objective
from stage_grpo import trainer as trainer_module
from stage_grpo.config import PRESETS, StageConfig
from stage_grpo.planning.setting import LORA_TARGETS
from stage_grpo.policy import load_policy
from stage_grpo.rewards.base import as_trl_reward
from stage_grpo.shapes import tiny
from stage_grpo.trainer import StageTrainer
from stage_grpo.trl_seams import reference_of, sample_images

LOSS_TYPES = ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """As deep as the shipped policy: agreement with TRL is that of all its layers."""
    return save_untrained(tmp_path_factory.mktemp("checkpoint"), tiny.NUM_LAYERS)


def brightness(images, prompts, metadata):
    """Mean grey level: a number that differs between images, also between those of an untrained policy."""
    return [sum(image.convert("L").tobytes()) / (48 * 48) for image in images]


def dataset(rows=8):
    return Dataset.from_dict({"prompt": [PROMPTS[i % 4] for i in range(rows)], "metadata": ["{}"] * rows})


def config(folder, **changes):
    values = {
        "preset": "paper",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "guidance_scale": 3.0,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "sample_steps": 0,
        "seed": 5,
    }
    return StageConfig(str(folder), **{**values, **changes})


def trainer_for(checkpoint, folder, reward=brightness, rows=8, **changes):
    extra = {name: changes.pop(name) for name in ("peft_config", "eval_dataset") if name in changes}
    return StageTrainer(load_policy(checkpoint), reward, config(folder, **changes), dataset(rows), **extra)


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scored_batch(trainer):
    """One generation batch as training sees it, with the policy moved away from reference and old policy."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    rows = [dict(row) for row in trainer.train_dataset.select(range(2)) for _ in range(4)]
    batch = trainer._generate_and_score_completions(rows)
    batch["old_per_token_logps"] = batch["ref_per_token_logps"].clone()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return batch


def loss_and_gradients(trainer, batch, compute):
    trainer.model.zero_grad()
    loss = compute(trainer.model, dict(batch))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def assert_same(one, other, atol=1e-6):
    torch.testing.assert_close(one[0], other[0], atol=atol, rtol=0)
    assert one[1].keys() == other[1].keys() and len(one[1]) >= 20
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], atol=atol, rtol=0)


def plain_trl_trainer(checkpoint, folder, **changes):
    """TRL's own trainer on the same policy: nothing of StageTrainer but the rollout function it needs."""
    policy = load_policy(checkpoint)
    args = GRPOConfig(
        str(folder),
        per_device_train_batch_size=8,
        num_generations=4,
        max_steps=3,
        beta=0.03,
        bf16=False,
        gradient_checkpointing=False,
        max_completion_length=36,
        use_bias_correction_kl=False,
        seed=5,
        **{"loss_type": "grpo", **changes},
    )
    with reference_of(policy):
        plain = GRPOTrainer(
            policy, [as_trl_reward(brightness)], args, dataset(), processing_class=_tokenizer(policy),
            rollout_func=sample_images,
        )  # fmt: skip
    for model in (plain.model, plain.ref_model):
        add_fused_lm_head(model, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy"))
    plain.current_gradient_accumulation_steps = 1
    return plain


def _tokenizer(policy):
    from stage_grpo.policy import load_tokenizer

    return load_tokenizer(policy)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_everything_off_equals_trl(checkpoint, tmp_path, loss_type, monkeypatch):
    monkeypatch.setattr(trainer_module, "onednn_pays", lambda: False)  # TRL's trainer has PyTorch's products
    stage = trainer_for(checkpoint, tmp_path / "a", preset="grpo", loss_type=loss_type, share_prompts=False)
    batch = scored_batch(stage)
    plain = plain_trl_trainer(checkpoint, tmp_path / "b", loss_type=loss_type)
    plain.model.load_state_dict(stage.model.state_dict())
    plain.model.train()
    ours = loss_and_gradients(stage, batch, stage._compute_loss)
    assert_same(ours, loss_and_gradients(plain, batch, plain._compute_loss))
    assert ours[0].abs() > 1e-5


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_of_one_equal_trl(checkpoint, tmp_path, loss_type):
    stage = trainer_for(checkpoint, tmp_path / "a", preset="grpo", loss_type=loss_type)
    batch = scored_batch(stage)
    expected = loss_and_gradients(stage, batch, super(StageTrainer, stage)._compute_loss)
    batch["kl_weights"] = torch.ones_like(batch["ref_per_token_logps"])
    if loss_type != "vespo":  # its weight per sequence is a mean over tokens, and accepts (B, 1) alone
        batch["advantages"] = batch["advantages"][:, None].expand(-1, 36)
    assert_same(loss_and_gradients(stage, batch, stage._compute_loss), expected)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_kl_weight_of_two_equals_twice_the_beta(checkpoint, tmp_path, loss_type, bias_correction):
    stage = trainer_for(
        checkpoint, tmp_path, preset="grpo", loss_type=loss_type, use_bias_correction_kl=bias_correction
    )
    batch = scored_batch(stage)
    weighted = dict(batch, kl_weights=torch.full_like(batch["ref_per_token_logps"], 2.0))
    ours = loss_and_gradients(stage, weighted, stage._compute_loss)
    stage.beta *= 2
    # luspo sums over the 36 tokens where the others take the mean, so its rounding errors are as many times larger.
    atol = 36e-6 if loss_type == "luspo" else 2e-6
    assert_same(ours, loss_and_gradients(stage, batch, super(StageTrainer, stage)._compute_loss), atol)


def test_loss_equals_the_objective_written_out(checkpoint, tmp_path):
    """Full STAGE against objective.policy_loss, from the batch the trainer made."""
    stage = trainer_for(checkpoint, tmp_path)
    batch = scored_batch(stage)
    ours = loss_and_gradients(stage, batch, stage._compute_loss)

    def written_out(model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        features = model.head_features(ids, mask)
        logps = torch.log_softmax(model.image_logits(features), dim=-1)
        logps = logps.gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
        names = ("old_per_token_logps", "ref_per_token_logps", "advantages")
        return objective.policy_loss(logps, *(inputs[n] for n in names), 0.03, inputs["kl_weights"])

    assert batch["advantages"].shape == batch["kl_weights"].shape == (8, 36)
    assert batch["kl_weights"].std() > 0.01
    assert_same(ours, loss_and_gradients(stage, batch, written_out), atol=2e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(checkpoint, tmp_path, preset):
    stage = trainer_for(checkpoint, tmp_path, preset=preset)
    before = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    stage.train()
    rows = logged(tmp_path)[:3]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    for name, parameter in stage.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name


def test_a_cispo_that_weakens_every_token_is_told_of(tmp_path, caplog):
    for values, told in (({}, True), ({"epsilon_high": 5.0}, False), ({"epsilon": 1.5}, False)):
        caplog.clear()
        config(tmp_path, loss_type="cispo", **values)
        assert ("at most by epsilon_high=0.2" in caplog.text) == told
    config(tmp_path, loss_type="grpo")
    assert caplog.text == ""


@pytest.mark.parametrize("loss_type", LOSS_TYPES[1:])
def test_every_loss_type_trains_with_stage(checkpoint, tmp_path, loss_type):
    extra = {"reweight_advantages": False} if loss_type == "vespo" else {}
    level = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    stage = trainer_for(checkpoint, tmp_path, loss_type=loss_type, **extra, **level)
    stage.train()
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in logged(tmp_path)[:3])


def test_kl_and_entropy_gap_vanish_before_the_first_update(checkpoint, tmp_path):
    stage = trainer_for(checkpoint, tmp_path, max_steps=2)
    stage.train()
    first, second = logged(tmp_path)[:2]
    assert first["kl"] == 0.0
    # Sampling goes through the cache and scoring does not: the same numbers up to float32 rounding.
    assert first["entropy/gap"] < 1e-5
    assert second["kl"] > 1e-6 and second["entropy/gap"] > 1e-4


def test_a_reward_named_as_the_entropy_reward_is_refused_beside_it(checkpoint, tmp_path):
    def entropy(images, prompts, metadata):
        return [0.0] * len(images)

    with pytest.raises(ValueError, match=r"'entropy', as is the entropy reward.* or set entropy_reward_weight=0"):
        trainer_for(checkpoint, tmp_path, reward=entropy)
    trainer_for(checkpoint, tmp_path, reward=entropy, entropy_reward_weight=0.0)


def test_reference_is_a_policy_scored_by_its_image_head(checkpoint, tmp_path):
    stage = trainer_for(checkpoint, tmp_path)
    assert type(stage.ref_model) is type(stage.model)
    batch = scored_batch(trainer_for(checkpoint, tmp_path / "b"))
    reference = load_policy(checkpoint)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = reference.image_logits(reference.head_features(ids, mask))
    expected = torch.log_softmax(logits, -1).gather(-1, batch["completion_ids"][..., None]).squeeze(-1)
    torch.testing.assert_close(batch["ref_per_token_logps"], expected, atol=1e-5, rtol=0)


def test_guided_scoring_has_ratio_one_and_no_kl_at_the_first_update(checkpoint, tmp_path):
    stage = trainer_for(checkpoint, tmp_path, guidance_in_scoring=True, max_steps=2)
    stage.model.train()
    rows = [dict(row) for row in stage.train_dataset.select(range(2)) for _ in range(4)]
    batch = stage._generate_and_score_completions(rows)
    # Recorded while sampling against teacher-forced guided scoring, here of the reference = the policy.
    torch.testing.assert_close(batch["sampling_per_token_logps"], batch["ref_per_token_logps"], atol=1e-4, rtol=0)
    stage.train()
    first, second = logged(tmp_path)[:2]
    assert first["kl"] == 0.0 and first["entropy/gap"] < 1e-4 and second["kl"] > 1e-6


def test_lora_trains_adapters_alone_with_the_base_as_reference(checkpoint, tmp_path):
    stage = trainer_for(checkpoint, tmp_path, peft_config=LoraConfig(r=4, target_modules=LORA_TARGETS))
    assert stage.ref_model is None
    before = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    stage.train()
    first, second = logged(tmp_path)[:2]
    assert first["kl"] == 0.0 and first["entropy/gap"] < 1e-5 and second["kl"] > 1e-8
    moved = {n for n, p in stage.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in name and "language_model" in name for name in moved)


def test_splitting_the_batch_into_micro_batches_changes_nothing(checkpoint, tmp_path):
    runs = []
    for name, size, accumulation in (("one", 8, 1), ("four", 2, 4)):
        stage = trainer_for(
            checkpoint,
            tmp_path / name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
        )
        start = {n: p.detach().clone() for n, p in stage.model.named_parameters()}
        stage.train()
        runs.append({n: p.detach() - start[n] for n, p in stage.model.named_parameters() if p.requires_grad})
    assert max(step.abs().max() for step in runs[0].values()) > 1e-3
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name], atol=1e-6, rtol=0)


def test_several_iterations_clip_higher_entropy_mask_and_sequence_ratio_work_together(checkpoint, tmp_path):
    stage = trainer_for(
        checkpoint,
        tmp_path,
        num_iterations=2,
        gradient_accumulation_steps=1,
        epsilon_high=0.28,
        top_entropy_quantile=0.5,
        importance_sampling_level="sequence",
        max_steps=4,
    )
    stage.train()
    rows = logged(tmp_path)[:4]
    assert all(math.isfinite(row["loss"]) for row in rows)
    # Images are sampled at every second step; the ones between reuse them.
    assert ["seconds/rollout" in row for row in rows] == [True, False, True, False]


def test_entropy_reward_is_weighted_into_the_reward(checkpoint, tmp_path):
    stage = trainer_for(checkpoint, tmp_path, reward_weights=[2.0], entropy_reward_weight=0.5, max_steps=1)
    stage.train()
    row = logged(tmp_path)[0]
    expected = 2 * row["rewards/brightness/mean"] + 0.5 * row["rewards/entropy/mean"]
    assert row["reward"] == pytest.approx(expected, rel=1e-6)
    assert row["rewards/entropy/mean"] == pytest.approx(row["entropy_reward"], abs=1e-6)
    # Before the first update the gap is 0, so each unique top gets 1 and the others 0: 1/4 of each group.
    assert row["entropy_reward"] == pytest.approx(0.25, abs=1e-5)


def test_several_rewards_and_samples_that_could_not_be_scored(checkpoint, tmp_path):
    def sometimes(images, prompts, metadata):
        return [None if i % 4 == 0 else 1.0 * i for i in range(len(images))]

    stage = trainer_for(checkpoint, tmp_path, reward=[sometimes], max_steps=1, preset="grpo")
    stage.model.train()
    rows = [dict(row) for row in stage.train_dataset.select(range(2)) for _ in range(4)]
    batch = stage._generate_and_score_completions(rows)
    # Scores per group: none, 1, 2, 3 -> mean 2, unbiased std 1; the first has no say and no advantage.
    expected = torch.tensor([0, -1, 0, 1] * 2) / (1 + 1e-4)
    torch.testing.assert_close(batch["advantages"], expected, atol=1e-5, rtol=0)
    stage.train()
    assert logged(tmp_path)[0]["reward_failures"] == 2


def test_tied_groups_get_no_advantage_and_no_kl_where_asked(checkpoint, tmp_path):
    def tied(images, prompts, metadata):
        return [1.0] * 4 + [0.0, 1.0, 2.0, 3.0]

    stage = trainer_for(checkpoint, tmp_path, reward=tied, kl_on_zero_variance=False, entropy_reward_weight=0.0)
    stage.model.train()
    rows = [dict(row) for row in stage.train_dataset.select(range(2)) for _ in range(4)]
    batch = stage._generate_and_score_completions(rows)
    assert batch["advantages"][:4].eq(0).all() and batch["kl_weights"][:4].eq(0).all()
    assert batch["advantages"][4:].ne(0).any() and batch["kl_weights"][4:].gt(0).all()


@pytest.mark.parametrize("aggregation", ["weighted_sum", "normalize_then_sum"])
def test_spread_below_the_guard_counts_as_a_tie(checkpoint, tmp_path, aggregation):
    def nearly(images, prompts, metadata):
        return [1.0, 1.0, 1.0, 1.001] * 2

    stage = trainer_for(checkpoint, tmp_path, reward=nearly, preset="grpo", reward_aggregation=aggregation)
    stage.model.train()
    for guard, tie in ((0.0, False), (0.01, True)):
        stage.args.min_reward_std = guard
        rows = [dict(row) for row in stage.train_dataset.select(range(2)) for _ in range(4)]
        assert stage._generate_and_score_completions(rows)["advantages"].eq(0).all() == tie


def test_entropy_loss_adds_the_squared_gap_with_its_gradient(checkpoint, tmp_path, monkeypatch):
    stage = trainer_for(checkpoint, tmp_path, preset="grpo", entropy_loss_weight=0.5)
    batch = scored_batch(stage)
    ours = loss_and_gradients(stage, batch, stage._compute_loss)

    def written_out(model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logits = model.image_logits(model.head_features(ids, mask))
        logps = torch.log_softmax(logits, dim=-1)
        gap = inputs["ref_entropy"] + (logps.exp() * logps).sum(-1).mean(1)
        return super(StageTrainer, stage)._compute_loss(model, inputs) + 0.5 * (gap**2).mean()

    assert (batch["ref_entropy"] - batch["ref_entropy"].mean()).abs().max() > 1e-3
    assert_same(ours, loss_and_gradients(stage, batch, written_out), atol=2e-6)
    # The mean over processes, here two of which the second has three times as much.
    monkeypatch.setattr(stage, "_gather", lambda part: torch.stack([part, 3 * part]))
    stage._compute_loss(stage.model, dict(batch))
    first, both = stage._metrics["train"]["entropy_loss"]
    assert both == pytest.approx(2 * first, rel=1e-5) and first > 0


def test_evaluation_logs_and_repeats_exactly(checkpoint, tmp_path):
    stage = trainer_for(
        checkpoint, tmp_path, eval_dataset=dataset(4), num_generations_eval=2, per_device_eval_batch_size=4
    )
    first, second = stage.evaluate(), stage.evaluate()
    assert first["eval_rewards/brightness/mean"] == second["eval_rewards/brightness/mean"] > 0
    assert first["eval_kl"] == 0.0


def test_samples_are_of_training_steps_alone(checkpoint, tmp_path):
    """Also where an evaluation comes between a rollout and the last of its steps."""
    other = Dataset.from_dict({"prompt": ["a photo of a test"] * 4, "metadata": ["{}"] * 4})
    tested = {"eval_dataset": other, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    trainer_for(checkpoint, tmp_path, num_iterations=2, max_steps=2, sample_steps=1, **tested).train()
    first, second = (json.loads(path.read_text())["prompts"] for path in sorted(tmp_path.glob("samples/*.json")))
    assert first == second and "a photo of a test" not in first


def test_the_first_kl_is_zero_under_autocast_too(checkpoint, tmp_path):
    """The reference is scored with whole groups, the policy in batches in which a prompt may stand alone."""
    changed = {"per_device_train_batch_size": 2, "num_generations": 2, "gradient_accumulation_steps": 4}
    stage = trainer_for(checkpoint, tmp_path, bf16=True, use_cpu=True, max_steps=1, **changed)
    stage.train()
    assert stage.model.shares_prompts and logged(tmp_path)[0]["kl"] == 0


def test_the_same_seed_repeats_a_run_and_another_does_not(checkpoint, tmp_path):
    def rewards(seed, name):
        trainer_for(checkpoint, tmp_path / name, seed=seed).train()
        return [row["reward"] for row in logged(tmp_path / name)[:3]]

    first = rewards(5, "a")
    assert rewards(5, "b") == first
    assert rewards(6, "c") != first


def test_gradient_checkpointing_changes_no_gradient(checkpoint, tmp_path):
    plain = trainer_for(checkpoint, tmp_path / "a", max_steps=1)
    recomputed = trainer_for(checkpoint, tmp_path / "b", max_steps=1, gradient_checkpointing=True)
    plain.train()
    recomputed.train()
    one, other = logged(tmp_path / "a")[0], logged(tmp_path / "b")[0]
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-5)
    assert one["reward"] == other["reward"]


def test_the_clock_is_read_when_the_gpu_is_done(monkeypatch):
    events = []
    stream = SimpleNamespace(synchronize=lambda: events.append("done"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(devices, "time", SimpleNamespace(perf_counter=lambda: events.append("read") or 0.0))
    for name in ("cuda", "cpu"):
        devices.clock(torch.device(name))
    assert events == ["done", "read", "read"]


def test_run_folder_holds_what_is_promised(checkpoint, tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("stage_grpo.trainer.clock", lambda device: float(next(ticks)))
    stage = trainer_for(checkpoint, tmp_path, sample_steps=2, report_to=["tensorboard"])
    stage.train()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["seed"] == 5 and run["config"]["entropy_reward_weight"] == 0.4
    assert {"torch", "trl", "transformers", "python"} <= run["versions"].keys()
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        f"step_{step:06d}{end}" for step in (1, 2) for end in (".json", ".png", "_labelled.png")
    ]
    record = json.loads((tmp_path / "samples" / "step_000002.json").read_text())
    assert record["columns"] == 4 and record["grid"] == [6, 6] and len(record["weights"]) == 8
    assert all(len(weights) == 36 and 0 <= min(weights) <= max(weights) <= 1 for weights in record["weights"])
    row = logged(tmp_path)[0]
    promised = """reward reward_std kl kl_weighted entropy/policy entropy/reference entropy/gap entropy_reward
        rewards/brightness/mean rewards/brightness/std frac_reward_zero_std advantage_weights/mean
        advantage_weights/std kl_weights/mean kl_weights/std similarity/mean unique_images reward_failures
        seconds/rollout seconds/decode seconds/reward seconds/reference seconds/update step_time
        images_per_second memory/peak_mb loss grad_norm learning_rate"""
    assert set(promised.split()) <= row.keys()
    # The clock ticks when it is read: twice a phase, and twice around all of a rollout, its phases and its rewards.
    assert all(row[f"seconds/{phase}"] == 1 for phase in ("rollout", "decode", "reward", "reference"))
    assert row["seconds/update"] == 2
    assert row["images_per_second"] == pytest.approx(8 / 9)


def test_trackers_receive_metrics_and_sample_grids(checkpoint, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    stage = trainer_for(checkpoint, tmp_path / "run", sample_steps=1, max_steps=2, report_to=["tensorboard", "wandb"])
    stage.train()
    events = EventAccumulator(str(next((tmp_path / "tb").rglob("events*"))))
    events.Reload()
    assert {"train/reward", "train/kl_weighted", "train/entropy/gap"} <= set(events.Tags()["scalars"])
    assert [image.step for image in events.Images("samples")] == [1, 2]
    saved = list((tmp_path / "wandb").rglob("samples*.png"))
    assert len(saved) == 2, "wandb keeps a copy of every grid it was given"
