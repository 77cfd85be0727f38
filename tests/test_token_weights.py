"""Token weightings as an interface: what the trainer hands over and refuses; STAGE's is the equations."""

import dataclasses

import pytest
import torch

from stage_grpo import objective, similarity
from stage_grpo.config import PRESETS, StageConfig
from stage_grpo.token_weights import token_weights
from stage_grpo.weighting.base import FunctionWeighting, NoWeighting, TokenBatch, TokenWeighting, TokenWeights
from stage_grpo.weighting.options import StageKeys, chosen_weighting
from stage_grpo.weighting.registry import WEIGHTINGS, build_weighting
from stage_grpo.weighting.stage import StageOptions, StageWeighting
from test_trainer import assert_same, logged, loss_and_gradients, scored_batch, trainer_for


def made_up_batch(seed=0, num_groups=2, num_generations=4, grid=(6, 6), **changes):
    """Groups contiguous; the second one ties exactly, the first does not."""
    draws = torch.Generator().manual_seed(seed)
    shape = (num_groups * num_generations, grid[0] * grid[1])
    rewards = torch.rand(shape[0], generator=draws)
    rewards[num_generations : 2 * num_generations] = 0.5
    values = {
        "code_vectors": torch.randn(*shape, 8, generator=draws),
        "codes": torch.randint(512, shape, generator=draws),
        "advantages": objective.group_advantages(rewards, num_generations),
        "rewards": rewards,
        "entropies": 4 * torch.rand(shape, generator=draws),
        "logps": -torch.rand(shape, generator=draws),
        "num_generations": num_generations,
        "grid": grid,
        "step": 3,
        "ref_logps": -torch.rand(shape, generator=draws),
    }
    return TokenBatch(**{**values, **changes})


# --- STAGE's weighting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("changes", [{}, {"kl_on_zero_variance": False}, {"kl_weight_form": "graded"}])
def test_stage_is_its_equations_bit_for_bit(tmp_path, preset, changes):
    config, batch = StageConfig(str(tmp_path), preset=preset, **changes), made_up_batch()
    weights, further = token_weights(
        chosen_weighting(config), batch, config.min_reward_std, config.kl_on_zero_variance
    )
    spread = objective.group_std(batch.rewards, 4) > config.min_reward_std
    assert spread.tolist() == [True] * 4 + [False] * 4
    advantages = torch.where(spread, batch.advantages, 0.0)
    alike = similarity.opposite_sign_similarity(batch.code_vectors, advantages, 4)
    expected = {"advantages": advantages}
    if config.reweight_advantages:
        normalization = config.advantage_weight_normalization
        expected["advantage_weights"] = similarity.advantage_weights(alike, 4, normalization)
        expected["advantages"] = advantages[:, None] * expected["advantage_weights"]
    if config.reweight_kl:
        expected["kl_weights"] = similarity.kl_weights(alike, form=config.kl_weight_form)
    if not config.kl_on_zero_variance:
        expected["kl_weights"] = expected.get("kl_weights", torch.ones(8, 36)) * spread[:, None]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert further.keys() == {"similarity"} and torch.equal(further["similarity"], alike)


def test_the_keys_of_stage_are_its_options_and_default_to_the_paper():
    keys, options = dataclasses.fields(StageKeys), dataclasses.fields(StageOptions)
    assert [key.name for key in keys] == [option.name for option in options]
    for option in options:
        wanted = PRESETS["paper"][option.name]
        assert option.default == (tuple(wanted) if isinstance(wanted, list) else wanted)


def test_no_weighting_is_plain_grpo(checkpoint, tmp_path):
    plain, none = (
        trainer_for(checkpoint, tmp_path / name, preset="grpo", token_weighting=name) for name in ("stage", "none")
    )
    batch, other = scored_batch(plain), scored_batch(none)
    assert batch.keys() == other.keys() and torch.equal(batch["advantages"], other["advantages"])
    compare = [loss_and_gradients(t, b, t._compute_loss) for t, b in ((plain, batch), (none, other))]
    assert_same(compare[0], compare[1], atol=0)


# --- functions and classes of one's own -------------------------------------------------------------------


def doubled(codes, advantages, entropies, step):
    return torch.full(codes.shape, 2.0)


def by_sign(codes, advantages, entropies, step, *, worse, better=1.0):
    return torch.where(advantages > 0, better, worse)[:, None].expand_as(codes)


class Reported(TokenWeighting):
    """Weighs nothing and reports what it was given."""

    needs_reference = True

    def compute(self, batch):
        type(self).seen = batch
        return TokenWeights(logged={"steps": torch.full(batch.advantages.shape, float(batch.step))})


class OfForm(TokenWeighting):
    """Gives what a test wants of it."""

    def __init__(self, given):
        super().__init__()
        self.given = given

    def compute(self, batch):
        return self.given


def test_a_weight_of_two_doubles_the_policy_gradient_alone(checkpoint, tmp_path):
    name = f"{__name__}:doubled"
    trainer = trainer_for(checkpoint, tmp_path, preset="grpo", token_weighting=name, beta=0.0, entropy_reward_weight=0)
    batch = scored_batch_without_reference(trainer)
    twice = loss_and_gradients(trainer, batch, trainer._compute_loss)
    once = loss_and_gradients(trainer, batch | {"advantages": batch["advantages"] / 2}, trainer._compute_loss)
    assert_same(twice, (2 * once[0], {name: 2 * gradient for name, gradient in once[1].items()}), atol=1e-6)
    assert "kl_weights" not in batch and twice[0].abs() > 1e-5


def scored_batch_without_reference(trainer):
    """As ``scored_batch``, for beta = 0; the old policy is the one that sampled."""
    trainer.model.train()
    rows = [dict(row) for row in trainer.train_dataset.select(range(2)) for _ in range(4)]
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions(rows)
    assert "ref_per_token_logps" not in batch
    batch["old_per_token_logps"] = batch["sampling_per_token_logps"] - 0.05
    return batch


def test_the_trainer_hands_over_the_batch_as_it_was_sampled(checkpoint, tmp_path):
    trainer = trainer_for(checkpoint, tmp_path, preset="grpo", token_weighting=f"{__name__}:Reported", max_steps=2)
    trainer.train()
    seen, policy = Reported.seen, trainer.model
    rows = [row for row in logged(tmp_path) if "reward" in row]
    assert [row["steps/mean"] for row in rows] == [0, 1] and seen.step == 1
    assert seen.grid == (6, 6) and seen.num_generations == 4 and seen.codes.shape == (8, 36)
    assert torch.equal(seen.code_vectors, policy.code_vectors(seen.codes))
    assert seen.entropies.mean().item() == pytest.approx(rows[-1]["entropy/policy"], abs=1e-5)
    assert seen.rewards.mean().item() == pytest.approx(rows[-1]["reward"], abs=1e-5)
    assert (seen.logps <= 0).all() and (seen.logps - seen.ref_logps).abs().max() > 1e-4


def test_policy_and_reference_agree_on_what_was_sampled_before_the_first_update(checkpoint, tmp_path):
    trainer = trainer_for(checkpoint, tmp_path, preset="grpo", token_weighting=f"{__name__}:Reported")
    scored_batch(trainer)
    torch.testing.assert_close(Reported.seen.logps, Reported.seen.ref_logps, atol=2e-5, rtol=0)


def test_a_function_gets_its_options_and_zeroed_advantages_of_tied_groups():
    weighting = build_weighting(f"{__name__}:by_sign", {"worse": 0.25})
    batch = made_up_batch(advantages=torch.tensor([1.0, -1.0, 0.5, -0.5, 1.0, -1.0, 1.0, -1.0]))
    weights, further = token_weights(weighting, batch, min_reward_std=1e-3)
    assert weights["advantage_weights"][:, 7].tolist() == [1.0, 0.25, 1.0, 0.25] + [0.25] * 4
    assert weights["advantages"][:, 7].tolist() == [1.0, -0.25, 0.5, -0.125, 0.0, 0.0, 0.0, 0.0]
    assert "kl_weights" not in weights and not further


def test_tied_groups_can_be_spared_the_kl_whatever_the_weighting():
    for weighting, at_most in ((NoWeighting(), 1.0), (build_weighting("critical"), 4.0)):
        weights, _ = token_weights(weighting, made_up_batch(), min_reward_std=1e-3, kl_on_zero_variance=False)
        assert weights["kl_weights"][:4].max() == at_most and not weights["kl_weights"][4:].any()


def test_a_weighting_carries_no_gradient_and_stays_in_its_precision():
    scale = torch.tensor(2.0, requires_grad=True)
    batch = made_up_batch()
    found = FunctionWeighting(lambda codes, *_: (scale * torch.ones(codes.shape)).bfloat16()).weigh(batch)
    assert not found.advantage_weights.requires_grad and found.advantage_weights.dtype == torch.float32


# --- refusals ---------------------------------------------------------------------------------------------

NAN = torch.ones(8, 36).index_fill(1, torch.tensor([3]), torch.nan)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(8, 36), r"gave a Tensor; return TokenWeights\(\.\.\.\)"),
        (
            TokenWeights(torch.ones(8, 1)),
            r"advantage_weights of shape \(8, 1\); return a tensor of shape \(8, 36\), one weight a token",
        ),
        (TokenWeights(NAN), r"advantage_weights that are not finite for 8 tokens; give such tokens the weight 0"),
        (TokenWeights(kl_weights=-torch.ones(8, 36)), r"kl_weights down to -1, .*; keep them at least 0"),
        (TokenWeights(logged={"x": torch.ones(3)}), r"logs x of shape \(3,\); give \(8, 36\) or \(8,\)"),
    ],
)
def test_what_a_weighting_gives_is_checked(given, message):
    with pytest.raises(ValueError, match=rf"^token weighting 'OfForm' .*{message}$") as refused:
        OfForm(given).weigh(made_up_batch())
    assert "\n" not in str(refused.value)


def test_a_function_may_give_numpy_or_lists_but_one_number_a_token():
    def of_arrays(codes, advantages, entropies, step):
        return codes.numpy() % 2

    def one_an_image(codes, advantages, entropies, step):
        return [1.0] * len(codes)

    batch = made_up_batch()
    assert torch.equal(FunctionWeighting(of_arrays).weigh(batch).advantage_weights, (batch.codes % 2).float())
    with pytest.raises(ValueError, match=r"'one_an_image' gave advantage_weights of shape \(8,\); return a tensor of"):
        FunctionWeighting(one_an_image).weigh(batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_weighting": "stag"}, r"token_weighting='stag' is unknown; known are critical, none, stage, or give"),
        ({"token_weighting": None}, r"token_weighting=None is no name; use none to weigh"),
        ({"token_weighting": "no_such:thing"}, r"'no_such:thing' cannot be imported .*; write module.path:name"),
        ({"token_weighting": "math:pi"}, r"'math:pi' is 3\.14.*; name a function weights"),
        ({"token_weighting": f"{__name__}:by_sign"}, r"lacks worse; give it in token_weighting_options"),
        (
            {"token_weighting": f"{__name__}:doubled", "token_weighting_options": {"by": 2}},
            r"doubled' has no option 'by'; it takes none",
        ),
        (
            {"token_weighting": "critical", "token_weighting_options": {"share": 1}},
            r"has no option 'share'; known are",
        ),
        ({"token_weighting_options": {"a": 1}}, r"\{'a': 1\} are not read by stage, .* set reweight_advantages, "),
        ({"token_weighting": "none", "token_weighting_options": 3}, r"=3 must map options to their values"),
        (
            {"token_weighting": "critical", "reweight_kl": False},
            r"reweight_kl=False is an option of token_weighting=stage and does nothing with critical; leave it out",
        ),
        (
            {"token_weighting": "critical", "preset": "grpo", "beta": 0.0},
            r"token_weighting='critical' needs the reference .* set beta above 0, or token_weighting_options: ",
        ),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_at_once(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        StageConfig(str(tmp_path), **changes)
    assert "\n" not in str(refused.value)


def test_a_resolved_configuration_can_be_read_again(tmp_path):
    config = StageConfig(str(tmp_path), preset="released", token_weighting="critical")
    again = {key.name: getattr(config, key.name) for key in dataclasses.fields(StageKeys)}
    kept = config.to_json()
    assert (kept["token_weighting"], kept["token_weighting_options"]) == ("critical", None)
    assert (
        StageConfig(str(tmp_path), preset="released", token_weighting="critical", **again).token_weighting
        == "critical"
    )


def test_a_configuration_changes_no_preset(tmp_path):
    StageConfig(str(tmp_path)).kl_weight_clip[1] = 0.5
    assert StageConfig(str(tmp_path)).kl_weight_clip == [0.0, 1.0]


def test_beta_zero_goes_with_critical_tokens_that_are_not_dynamic(tmp_path):
    config = StageConfig(
        str(tmp_path), preset="grpo", beta=0.0, token_weighting="critical", token_weighting_options={"dynamic": False}
    )
    assert not chosen_weighting(config).needs_reference


def test_every_name_of_the_table_builds():
    assert {type(build_weighting(name)).__name__ for name in WEIGHTINGS} == {
        "StageWeighting", "CriticalTokens", "NoWeighting"
    }  # fmt: skip
    assert all(build_weighting(name).name == name for name in WEIGHTINGS)
    assert isinstance(build_weighting("stage"), StageWeighting)
