"""Several rewards in a training: what is summed, what is left out, what a checkpoint keeps."""

import json
import math

import pytest
import torch

from stage_grpo.objective import group_advantages
from test_trainer import brightness, logged, trainer_for


def small(images, prompts, metadata):
    """Spreads by hundredths around 20, as a preference score does."""
    return [20 + 0.01 * (1000 * score % 1) for score in brightness(images, prompts, metadata)]


def large(images, prompts, metadata):
    return [1000 * score % 7 for score in brightness(images, prompts, metadata)]


def patchy(images, prompts, metadata):
    """As ``small``, but the image at place 5 has no score, and none of the first prompt has one."""
    return [score if i == 4 or i > 5 else None for i, score in enumerate(small(images, prompts, metadata))]


def step_of(trainer):
    trainer.model.train()
    rows = [dict(row) for row in trainer.train_dataset.select(range(2)) for _ in range(4)]
    batch = trainer._generate_and_score_completions(rows)
    return batch["advantages"].reshape(8, -1).mean(dim=1).double(), [row["generated_images"] for row in rows]


def expected(totals):
    return group_advantages(torch.tensor(totals, dtype=torch.float64), 4, min_std=1e-3)


def test_a_sample_that_one_of_two_rewards_failed_on_teaches_nothing(checkpoint, tmp_path):
    trainer = trainer_for(checkpoint, tmp_path, [large, patchy], preset="grpo")
    found, images = step_of(trainer)
    one, two = large(images, [], []), small(images, [], [])
    # The first prompt has the first reward alone; of the second, the sample at place 5 is out.
    totals = [one[i] if i < 4 else math.nan if i == 5 else one[i] + two[i] for i in range(8)]
    torch.testing.assert_close(found, expected(totals), rtol=0, atol=1e-4)
    assert found[5] == 0 and found.count_nonzero() == 7


def test_running_scales_let_a_small_spread_speak(checkpoint, tmp_path):
    trainer = trainer_for(checkpoint, tmp_path, [large, small], preset="grpo", reward_aggregation="running")
    found, images = step_of(trainer)
    one, two = (torch.tensor(reward(images, [], []), dtype=torch.float64) for reward in (large, small))
    spreads = [column.reshape(2, 4).var(dim=1).mean().sqrt() for column in (one, two)]
    totals = one / (spreads[0] + 1e-4) + two / (spreads[1] + 1e-4)
    torch.testing.assert_close(found, expected(totals.tolist()), rtol=0, atol=5e-3)  # 20 / 0.003 in float32
    assert abs(torch.corrcoef(torch.stack([found, expected(two.tolist())]))[0, 1]) > 0.3


def test_trl_normalises_then_sums(checkpoint, tmp_path):
    changes = {"preset": "grpo", "reward_aggregation": "normalize_then_sum"}
    trainer = trainer_for(checkpoint, tmp_path, [large, small], **changes)
    found, images = step_of(trainer)
    normalised = sum(expected(reward(images, [], [])) for reward in (large, small))
    wanted = normalised / (normalised.std() + 1e-4)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("aggregation", ["running", "normalize_then_sum"])
def test_a_resumed_run_continues_to_the_bit_and_logs_raw_rewards(aggregation, checkpoint, tmp_path):
    changes = {"reward_aggregation": aggregation, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    changes |= {"per_device_train_batch_size": 4, "num_generations": 2}
    straight = trainer_for(checkpoint, tmp_path / "straight", [large, small], **changes)
    straight.train()
    resumed = trainer_for(checkpoint, tmp_path / "resumed", [large, small], **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    state = json.loads((tmp_path / "straight" / "checkpoint-2" / "run_state.json").read_text())["reward_sum"]
    assert bool(state) == (aggregation == "running")
    assert resumed.reward_sum.state_dict() == straight.reward_sum.state_dict()
    for one, other in zip(straight.model.parameters(), resumed.model.parameters()):
        assert torch.equal(one, other)
    assert all(20 <= row["rewards/small/mean"] <= 20.01 for row in logged(tmp_path / "straight")[:4])
