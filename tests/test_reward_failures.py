"""Twelve ways in which a reward breaks, each in a real training of the tiny Janus: none trains on a wrong number."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from stage_grpo.cli import main
from stage_grpo.objective import group_advantages
from stage_grpo.policy import load_policy
from stage_grpo.rewards import server
from stage_grpo.rewards.base import RewardResult, as_reward
from stage_grpo.rewards.failures import FailureWatch, RewardFailedError
from stage_grpo.rewards.registry import build_reward
from test_remote_rewards import answering, free_port, start  # noqa: F401  (start is a fixture)
from test_trainer import brightness, logged, trainer_for

STEPS = {"max_steps": 6, "preset": "grpo", "per_device_train_batch_size": 4, "num_generations": 2}


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def stops_untrained(checkpoint, folder, reward, error, message):
    """The run ends in an error that names the reward, with the weights that it began with."""
    trainer = trainer_for(checkpoint, folder, reward, **STEPS)
    before = weights_of(trainer.model)
    with pytest.raises(error, match=message) as caught:
        trainer.train()
    after = weights_of(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    return trainer, caught.value


def broken(returned):
    def broken_reward(images, prompts, metadata):
        return returned(len(images))

    return broken_reward


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: [0.5] * (n - 1), "'broken_reward' returned 3 scores for 4 images; return as many"),
        (lambda n: [0.5] * (n - 1) + [math.inf], "'broken_reward' returned inf for image 3; return a finite number"),
        (lambda n: ["0.5"] * n, "'broken_reward' returned '0.5' for image 0; return a number"),
    ],
    ids=["1 wrong length", "2 infinity", "3 strings"],
)
def test_what_is_no_score_stops_the_run(returned, message, checkpoint, tmp_path):
    trainer, _ = stops_untrained(checkpoint, tmp_path, broken(returned), ValueError, message)
    assert trainer.state.global_step == 0


def test_4_an_exception_stops_the_run_and_names_the_reward(checkpoint, tmp_path):
    def exploding(images, prompts, metadata):
        raise KeyError("colour")

    trainer, error = stops_untrained(checkpoint, tmp_path, exploding, KeyError, "colour")
    assert error.__notes__ == ["raised by reward 'exploding'"] and trainer.state.global_step == 0


@pytest.mark.parametrize("missing", [math.nan, None], ids=["5 NaN", "6 always failing"])
def test_a_reward_that_never_scores_stops_the_run(missing, checkpoint, tmp_path):
    message = "'broken_reward' could not score a single image in 3 steps in a row, .* no reason given; repair it"
    trainer, _ = stops_untrained(checkpoint, tmp_path, broken(lambda n: [missing] * n), RewardFailedError, message)
    assert trainer.state.global_step == 2
    assert [row["reward_failures"] for row in logged(tmp_path)[:2]] == [4, 4]


def test_7_a_reward_that_fails_on_some_samples_leaves_those_out(checkpoint, tmp_path):
    """Every tenth image has no score: it gets advantage 0, and the others are compared among themselves."""
    seen = []

    def patchy(images, prompts, metadata):
        scores = [1000 * score % 1 for score in brightness(images, prompts, metadata)]  # as good as random, in [0, 1)
        seen.append([None if (8 * len(seen) + i) % 10 == 3 else score for i, score in enumerate(scores)])
        return seen[-1]

    trainer = trainer_for(checkpoint, tmp_path, patchy, preset="grpo", max_steps=3)
    handed = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: handed.append(generate(rows)) or handed[-1]
    trainer.train()
    assert [scores.count(None) for scores in seen] == [1, 1, 1]
    for scores, batch in zip(seen, handed):
        rewards = torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float64)
        found = batch["advantages"].reshape(8, -1).mean(dim=1).double()
        torch.testing.assert_close(found, group_advantages(rewards, 4, min_std=1e-3), rtol=0, atol=1e-5)
        missing = scores.index(None)
        assert found[missing] == 0 and found.count_nonzero() == 7
    rows = logged(tmp_path)[:3]
    assert [row["reward_failures"] for row in rows] == [1, 1, 1]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


def remote_options(url, **options):
    return {"url": url, "retries": 0, "timeout": 0.2, **options}


def test_8_a_server_that_is_down_stops_the_run(checkpoint, tmp_path):
    reward = build_reward("judge", remote_options(f"http://127.0.0.1:{free_port()}"))
    trainer, _ = stops_untrained(
        checkpoint,
        tmp_path,
        reward,
        RewardFailedError,
        "'judge' could not score .* 3 steps in a row.*cannot be reached",
    )
    assert trainer.state.global_step == 2


def test_9_a_server_that_answers_garbage_stops_the_run(checkpoint, tmp_path, start):  # noqa: F811
    ones = json.dumps({"protocol": 1, "scores": ["1.0"] * 4}).encode()
    reward = build_reward("judge", remote_options(start(answering(ones))))
    stops_untrained(checkpoint, tmp_path, reward, RewardFailedError, "holds '1.0', which is no finite number")


def test_10_a_server_that_is_too_slow_stops_the_run(checkpoint, tmp_path, start):  # noqa: F811
    reward = build_reward("judge", remote_options(start(answering(b"{}", after=30.0))))
    stops_untrained(checkpoint, tmp_path, reward, RewardFailedError, "'judge' .*gave no answer in time")


RECIPE = ["--per_device_train_batch_size", "8", "--num_generations", "4", "--max_steps", "2", "--save_strategy", "no"]


def train_by_command(checkpoint, folder, name, capsys):
    """Standard error of a ``stage train`` that must end in one line."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a photo of a circle\na photo of a ring\n")
    given = ["--model", checkpoint, "--train_prompts", str(prompts), "--output_dir", str(folder / "out")]
    with pytest.raises(SystemExit) as ended:
        main(["train", *given, "--rewards", name, *RECIPE])
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and not (folder / "out").exists()
    return error


def test_11_missing_weights_end_before_the_first_step(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STAGE_WEIGHTS", str(tmp_path / "weights"))
    error = train_by_command(checkpoint, tmp_path, "hps", capsys)
    assert "the weights 'hps-v2.1' are not in" in error and "stage weights get hps-v2.1" in error


def test_12_a_missing_package_ends_before_the_first_step(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("stage_grpo.rewards.ocr.OcrReward.packages", ("rapidocr", "no_such_package"))
    error = train_by_command(checkpoint, tmp_path, "ocr", capsys)
    assert "reward 'ocr' needs no_such_package" in error and "pip install 'stage-grpo[ocr]'" in error


def test_training_with_a_remote_reward_equals_training_with_the_local_one(checkpoint, tmp_path, start):  # noqa: F811
    runs = {}
    url = start(server.make_app(as_reward(brightness)))
    for name, reward in {"local": brightness, "remote": build_reward("brightness", {"url": url})}.items():
        trainer = trainer_for(checkpoint, tmp_path / name, reward, **{**STEPS, "max_steps": 2})
        trainer.train()
        runs[name] = weights_of(trainer.model)
    assert all(torch.equal(runs["local"][name], runs["remote"][name]) for name in runs["local"])
    before = dict(load_policy(checkpoint).named_parameters())
    assert any(not torch.equal(before[name], parameter) for name, parameter in runs["remote"].items())


# ---- when a run stops -----------------------------------------------------------------------------------------------


def test_steps_count_in_a_row_and_prompts_that_do_not_apply_neither_count_nor_excuse(caplog):
    watch = FailureWatch("git", patience=2)
    none = np.array([math.nan, math.nan])
    failed, idle = {"reason": ["no memory", "no memory"]}, {"reason": ["not applicable: spatial", "not applicable"]}
    watch.see(none, failed)
    watch.see(np.array([math.nan, 0.5]), failed)  # one score is enough
    assert watch.failed_steps == 0
    for _ in range(5):
        watch.see(none, idle)
    assert watch.failed_steps == 0
    watch.see(none, failed)
    watch.see(none, idle)
    assert "step 1 of 2 in a row after which the run stops: no memory" in caplog.text
    with pytest.raises(RewardFailedError, match="'git' could not score a single image in 2 steps in a row"):
        watch.see(none, {"reason": ["no memory", "not applicable"]})


def test_a_reward_that_does_not_apply_is_no_failure(caplog):
    def shy(images, prompts, metadata):
        reasons = ["not applicable: no quoted text", "unreadable", "unreadable"]
        return RewardResult(np.full(3, math.nan), {"reason": reasons})

    as_reward(shy).score([Image.new("RGB", (4, 4))] * 3, ["a", "b", "c"])
    assert "reward 'shy' could not score 2 of 3 images: unreadable" in caplog.text
