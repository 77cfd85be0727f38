"""Opposite-sign similarity and the weights made of it: hand-worked numbers, oracles, laws."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

import oracles
from stage_grpo import entropy
from stage_grpo import similarity as sim


def close(actual: torch.Tensor, expected: object) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), atol=1e-6, rtol=0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- opposite_sign_similarity ----------------------------------------------------------------------------


def test_similarity_by_hand() -> None:
    # Two tokens, D = 2, one group of three with A = (1, -1, 1). Token 0: q = (1,0), (0,2), (3,3);
    # token 1: all (1,1). Samples 0 and 2 see only sample 1; sample 1 sees both.
    codes = torch.tensor(
        [[[1.0, 0.0], [1.0, 1.0]], [[0.0, 2.0], [1.0, 1.0]], [[3.0, 3.0], [1.0, 1.0]]],
    )
    half = 0.5**0.5  # cos((1,0),(0,2)) = 0, cos((0,2),(3,3)) = 1/sqrt(2)
    expected = [[0.0, 1.0], [half / 2, 1.0], [half, 1.0]]
    close(sim.opposite_sign_similarity(codes, torch.tensor([1.0, -1.0, 1.0]), 3), expected)


def test_zero_advantage_is_compared_with_all_others_but_never_with_itself() -> None:
    # A = (0, 1, 1): sample 0 sees 1 and 2; they see only sample 0. Cosines: 0-1 is 0, 0-2 is -1, 1-2 is 0.
    codes = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[-1.0, 0.0]]])
    close(sim.opposite_sign_similarity(codes, torch.tensor([0.0, 1.0, 1.0]), 3), [[-0.5], [0.0], [-1.0]])
    # Counting j = i in the denominator, as the released code does, would give -1/3 for sample 0.


def test_nobody_of_opposite_sign_gives_zero() -> None:
    codes = torch.ones(4, 3, 2)
    assert sim.opposite_sign_similarity(codes, torch.ones(4), 2).eq(0).all()
    assert sim.opposite_sign_similarity(codes, torch.tensor([1.0, -1.0, 0.0, 2.0]), 1).eq(0).all()


def test_zero_code_vectors_are_similar_to_nothing() -> None:
    codes = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]]])
    assert sim.opposite_sign_similarity(codes, torch.tensor([1.0, -1.0]), 2).eq(0).all()


def test_tiny_advantages_of_equal_sign_are_not_opposite() -> None:
    # 1e-30 squared underflows to 0 in float32, which "A_i * A_j <= 0" would take for opposite.
    assert sim.opposite_sign_similarity(torch.ones(2, 1, 2), torch.full((2,), 1e-30), 2).eq(0).all()


@pytest.mark.parametrize("num_generations", [2, 3, 4, 12])
def test_similarity_matches_the_oracle(num_generations: int) -> None:
    codes, advantages = random(12, 5, 4, seed=1), random(12, seed=2)
    advantages[[0, 7]] = 0.0
    codes[3, 2] = 0.0
    actual = sim.opposite_sign_similarity(codes, advantages, num_generations)
    close(actual, oracles.opposite_sign_similarity(codes.tolist(), advantages.tolist(), num_generations))


def test_float32_and_bfloat16_agree_with_float64() -> None:
    codes, advantages = random(8, 6, 8, seed=1), random(8, seed=2)
    exact = sim.opposite_sign_similarity(codes, advantages, 4)
    close(sim.opposite_sign_similarity(codes.float(), advantages.float(), 4), exact)
    coarse = codes.bfloat16()
    close(
        sim.opposite_sign_similarity(coarse, advantages.float(), 4),
        sim.opposite_sign_similarity(coarse.double(), advantages, 4),
    )


def test_similarity_ignores_code_length_and_advantage_size() -> None:
    codes, advantages = random(6, 3, 4), random(6, seed=1)
    scale = random(6, 3, 1, seed=2).abs() + 0.1
    actual = sim.opposite_sign_similarity(codes * scale, advantages * 1e-3, 3)
    close(actual, sim.opposite_sign_similarity(codes, advantages, 3))


def test_permuting_a_group_and_groups_permutes_the_similarity() -> None:
    codes, advantages = random(8, 3, 4), random(8, seed=1)
    base = sim.opposite_sign_similarity(codes, advantages, 4)
    for order in ([3, 1, 0, 2, 4, 5, 7, 6], [4, 5, 6, 7, 0, 1, 2, 3]):
        close(sim.opposite_sign_similarity(codes[order], advantages[order], 4), base[order])
    tokens = [2, 0, 1]
    close(sim.opposite_sign_similarity(codes[:, tokens], advantages, 4), base[:, tokens])


def test_other_groups_never_matter() -> None:
    codes, advantages = random(8, 3, 4), random(8, seed=1)
    other_codes, other_advantages = codes.clone(), advantages.clone()
    other_codes[4:], other_advantages[4:] = random(4, 3, 4, seed=5), 9 * random(4, seed=6)
    for normalization in ("none", "group"):
        first, second = (
            sim.advantage_weights(sim.opposite_sign_similarity(c, a, 4), 4, normalization)[:4]
            for c, a in ((codes, advantages), (other_codes, other_advantages))
        )
        close(first, second)


# --- advantage_weights -----------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    # (1 - Sim) / 2; the group's mean is (0 + 0.5 + 1 + 0.5) / 4 = 0.5 and (0.25 + 0.75 + 0.5 + 0.5) / 4 = 0.5.
    similarity = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.5, -0.5], [0.0, 0.0]])
    weights = torch.tensor([[0.0, 0.5], [1.0, 0.5], [0.25, 0.75], [0.5, 0.5]])
    close(sim.advantage_weights(similarity, 2), weights)
    close(sim.advantage_weights(similarity, 2, "group"), 2 * weights)


@pytest.mark.parametrize("normalization", ["none", "group"])
def test_weights_match_the_oracle(normalization: sim.Normalization) -> None:
    similarity = random(6, 4).tanh()
    actual = sim.advantage_weights(similarity, 3, normalization)
    close(actual, oracles.advantage_weights(similarity.tolist(), 3, normalization))


def test_group_normalised_weights_have_mean_one_and_give_the_released_policy_term() -> None:
    similarity, advantages = random(8, 5).tanh(), random(8, seed=1)
    plain, grouped = (sim.advantage_weights(similarity, 8, n) for n in ("none", "group"))
    close(grouped.mean(), 1.0)
    released = (plain * advantages[:, None]).sum() / plain.sum()  # its sum over the only group it is right for
    close((grouped * advantages[:, None]).mean(), released)


def test_a_group_of_identical_images_gets_no_update_in_either_form() -> None:
    for normalization in ("none", "group"):
        assert sim.advantage_weights(torch.ones(4, 3), 4, normalization).eq(0).all()


# --- kl_weights ------------------------------------------------------------------------------------------


def test_kl_weights_by_hand() -> None:
    similarity = torch.tensor([[-1.0, -0.5, 0.0, 1.0]])
    # clipped: 0.5 + 0.5 * clip(0, 0.5, 1, 2; 0, 1); graded: 0.5 + 0.25 * (Sim + 1).
    close(sim.kl_weights(similarity), [[0.5, 0.75, 1.0, 1.0]])
    close(sim.kl_weights(similarity, form="graded"), [[0.5, 0.625, 0.75, 1.0]])
    close(sim.kl_weights(similarity, a=1.0, b=2.0, clip=(0.5, 1.5)), [[2.0, 2.0, 3.0, 4.0]])


@pytest.mark.parametrize("form", ["clipped", "graded"])
def test_kl_weights_match_the_oracle(form: sim.KLWeightForm) -> None:
    similarity = random(6, 4).tanh()
    actual = sim.kl_weights(similarity, 0.3, 0.9, (0.2, 1.4), form)
    close(actual, oracles.kl_weights(similarity.tolist(), 0.3, 0.9, (0.2, 1.4), form))


def test_the_published_clip_is_blind_to_every_positive_similarity() -> None:
    similarity = torch.linspace(0, 1, 11)[None]
    assert sim.kl_weights(similarity).eq(1.0).all()
    assert sim.kl_weights(similarity, form="graded").diff().gt(0).all()


def test_gradients_by_finite_differences() -> None:
    codes, advantages = random(6, 2, 3).requires_grad_(), random(6, seed=1)
    assert torch.autograd.gradcheck(lambda q: sim.opposite_sign_similarity(q, advantages, 3), codes)
    similarity = (random(6, 2).tanh() * 0.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sim.advantage_weights(s, 3, "group"), similarity)
    assert torch.autograd.gradcheck(lambda s: sim.kl_weights(s, form="graded"), similarity)


def test_wrong_inputs() -> None:
    similarity = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="4 samples do not split into groups of num_generations=3"):
        sim.opposite_sign_similarity(torch.zeros(4, 2, 2), torch.zeros(4), 3)
    with pytest.raises(ValueError, match=r"clip is \(1.0, 0.0\)"):
        sim.kl_weights(similarity, clip=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"a=0.5, b=-1.0 give KL weights down to -0.5"):
        sim.kl_weights(similarity, b=-1.0)


def test_unknown_names_say_what_exists() -> None:
    similarity = torch.zeros(4, 2)
    jaxtyping.config.update("jaxtyping_disable", True)  # or the tests' type check speaks before ours does
    try:
        with pytest.raises(ValueError, match="normalization is 'batch'; choose one of none, group"):
            sim.advantage_weights(similarity, 2, "batch")
        with pytest.raises(ValueError, match="form is 'linear'; choose one of clipped, graded"):
            sim.kl_weights(similarity, form="linear")
        with pytest.raises(ValueError, match="scope is 'best'; choose one of top, all"):
            entropy.entropy_reward(similarity[:, 0], similarity[:, 0], similarity[:, 0], 2, scope="best")
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
