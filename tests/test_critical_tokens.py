"""Critical tokens (GCPO, arXiv:2509.22485): each equation by hand, the whole against loops, the loss written out."""

import math
import re
from pathlib import Path

import pytest
import torch

from stage_grpo import objective
from stage_grpo.weighting import critical
from stage_grpo.weighting.critical import CriticalOptions, CriticalTokens
from stage_grpo.weighting.registry import build_weighting
from test_token_weights import made_up_batch
from test_trainer import assert_same, loss_and_gradients, scored_batch, trainer_for

# Entropy 5 nats at the middle of the right edge of 3 x 3. Neighbours left, upper left, above, upper right, itself:
# the token sees 5/4 (nothing to its right), the middle of the last row 5/5 (it is its upper right), the last one 5/4.
ENTROPIES = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0]])
SMOOTHED = [[0.0, 0.0, 0.0], [0.0, 0.0, 1.25], [0.0, 1.0, 1.25]]


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


# --- the three sets ---------------------------------------------------------------------------------------


def test_initial_tokens_are_the_first_share_rounded_down():
    assert critical.initial_tokens(36, 0.1).tolist() == [True] * 3 + [False] * 33
    assert critical.initial_tokens(576, 0.1).sum() == 57
    assert critical.initial_tokens(100, 0.29).sum() == 29, "0.29 * 100 is 28.999999999999996"


def test_entropies_are_smoothed_over_earlier_neighbours():
    close(critical.smoothed_entropies(ENTROPIES, (3, 3)), [SMOOTHED])
    # 1; (2 + 1) / 2; (3 + 1 + 2) / 3; (4 + 3 + 1 + 2) / 4.
    close(critical.smoothed_entropies(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), (2, 2)), [[[1.0, 1.5], [2.0, 2.5]]])


def test_a_flat_entropy_map_has_no_gradient():
    flat = torch.full((2, 12), 3.7)
    close(critical.smoothed_entropies(flat, (3, 4)), [[[3.7] * 4] * 3] * 2)
    close(critical.entropy_gradients(flat, (3, 4)), [[0.0] * 12] * 2)


def test_gradients_are_central_inside_and_one_sided_at_the_border():
    # Of SMOOTHED along columns: 0 0 0; 0 .625 1.25; 1 .625 .25. Along rows: 0 0 1.25; 0 .5 .625; 0 1 0.
    lengths = [0, 0, 1.25, 0, math.hypot(0.625, 0.5), math.hypot(1.25, 0.625), 1, math.hypot(0.625, 1), 0.25]
    close(critical.entropy_gradients(ENTROPIES, (3, 3)), [lengths])


def test_structure_tokens_are_the_steepest_between_both_ends():
    gradients = torch.tensor([[9.0, 1.0, 3.0, 2.0, 5.0, 4.0, 0.0, 6.0, 7.0, 8.0]])
    assert critical.structure_tokens(gradients, 0.2, 0.1, 0.1).nonzero()[:, 1].tolist() == [7, 8]
    assert critical.structure_tokens(gradients, 0.3, 0.2, 0.3).nonzero()[:, 1].tolist() == [2, 4, 5]
    # At 576 tokens the authors' code looks at int(0.8 * 576) = 460 tokens from the 57th on.
    rising = torch.arange(576.0)[None]
    assert critical.structure_tokens(rising, 0.1, 0.1, 0.1).nonzero()[:, 1].tolist() == list(range(460, 517))


def test_equal_gradients_give_the_first_tokens():
    chosen = critical.structure_tokens(torch.zeros(1, 10), 0.2, 0.1, 0.1)
    assert chosen.nonzero()[:, 1].tolist() == [1, 2]


def test_group_similarity_is_the_mean_over_pairs():
    e1, e2, none = [1.0, 0.0], [0.0, 3.0], [0.0, 0.0]
    vectors = torch.tensor([[e1, e1, e1], [e1, e2, e1], [e2, [-2.0, 0.0], none]])
    # Cosines of the pairs (1, 2), (1, 3), (2, 3): 1 0 0; 0 -1 0; 1 0 0.
    close(critical.group_similarity(vectors, 3), [[1 / 3, -1 / 3, 1 / 3]] * 3)
    close(critical.group_similarity(vectors[:2], 2), [[1.0, 0.0, 1.0]] * 2)
    close(critical.group_similarity(vectors, 1), [[0.0] * 3] * 3)


def test_diverse_tokens_are_the_least_alike_that_are_still_free():
    similarity = torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.9, 0.1, 0.2, 0.3]])
    taken = torch.tensor([[False] * 4, [False, True, False, False]])
    assert critical.diverse_tokens(similarity, 0.5, taken).tolist() == [
        [False, True, True, False], [False, False, True, True]
    ]  # fmt: skip


def test_dynamic_weights_are_running_means_of_clipped_ratios():
    difference = torch.tensor([[0.0, 1.0, -1.0], [math.log(1.5), -0.1, 0.0]])
    ref_logps = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    up, down, slightly = math.exp(0.5), math.exp(-0.5), math.exp(-0.1)
    close(
        critical.dynamic_weights(ref_logps + difference, ref_logps, 0.5),
        [[1, (1 + up) / 2, (1 + up + down) / 3], [1.5, (1.5 + slightly) / 2, (2.5 + slightly) / 3]],
    )


# --- the whole --------------------------------------------------------------------------------------------


def chosen_by_loops(batch, share=0.1):
    """Z_select of each image, one token at a time."""
    (rows, columns), num_tokens = batch.grid, batch.codes.shape[1]
    count, found = int(share * num_tokens), []
    for i, entropies in enumerate(batch.entropies.tolist()):
        group = range(i - i % batch.num_generations, i - i % batch.num_generations + batch.num_generations)
        smooth = {}
        for y in range(rows):
            for x in range(columns):
                near = [(y, x), (y, x - 1), (y - 1, x - 1), (y - 1, x), (y - 1, x + 1)]
                inside = [entropies[b * columns + a] for b, a in near if b >= 0 and 0 <= a < columns]
                smooth[y, x] = sum(inside) / len(inside)
        steepness = []
        for y in range(rows):
            for x in range(columns):
                left, right, up, down = max(x - 1, 0), min(x + 1, columns - 1), max(y - 1, 0), min(y + 1, rows - 1)
                across = (smooth[y, right] - smooth[y, left]) / (right - left)
                steepness.append(math.hypot(across, (smooth[down, x] - smooth[up, x]) / (down - up)))
        middle = range(count, count + int(0.8 * num_tokens))
        chosen = set(range(count)) | set(sorted(middle, key=lambda t: -steepness[t])[:count])
        cosine = torch.nn.functional.cosine_similarity
        vectors = batch.code_vectors.double()
        pairs = [(j, k) for j in group for k in group if j != k]
        alike = sum(cosine(vectors[j], vectors[k], dim=-1) for j, k in pairs) / len(pairs)
        free = [t for t in range(num_tokens) if t not in chosen]
        found.append(chosen | set(sorted(free, key=lambda t: alike[t].item())[:count]))
    return found


@pytest.mark.parametrize(("grid", "seed"), [((6, 6), 0), ((6, 6), 1), ((5, 8), 2), ((12, 12), 3)])
def test_the_sets_are_those_of_the_equations(grid, seed):
    batch = made_up_batch(seed, grid=grid)
    chosen = build_weighting("critical").choose(batch)
    assert [set(row.nonzero()[:, 0].tolist()) for row in chosen] == chosen_by_loops(batch)
    assert chosen.sum(dim=1).tolist() == [3 * int(0.1 * grid[0] * grid[1])] * 8


def test_weights_of_an_image_have_mean_one_on_critical_tokens_and_are_zero_elsewhere():
    batch = made_up_batch(ref_logps=None)
    weighting = CriticalTokens(CriticalOptions(dynamic=False))
    found, chosen = weighting.weigh(batch), weighting.choose(batch)
    assert torch.equal(found.advantage_weights, found.kl_weights)
    close(found.advantage_weights.mean(dim=1), [1.0] * 8)
    assert found.advantage_weights[chosen].unique().tolist() == [4.0] and not found.advantage_weights[~chosen].any()
    over_all = CriticalTokens(CriticalOptions(dynamic=False, average_over="all", kl_on_all_tokens=True)).weigh(batch)
    assert torch.equal(over_all.advantage_weights, chosen.float()) and over_all.kl_weights is None


def test_dynamic_weights_multiply_advantages_and_leave_the_kl_alone():
    batch = made_up_batch()
    plain = CriticalTokens(CriticalOptions(dynamic=False)).weigh(batch)
    found = CriticalTokens().weigh(batch)
    dynamic = critical.dynamic_weights(batch.logps, batch.ref_logps, 0.5)
    assert torch.equal(found.advantage_weights, plain.advantage_weights * dynamic)
    assert torch.equal(found.kl_weights, plain.kl_weights) and torch.equal(found.logged["dynamic_weights"], dynamic)
    at_reference = CriticalTokens().weigh(made_up_batch(ref_logps=batch.logps))
    assert torch.equal(at_reference.advantage_weights, plain.advantage_weights)


def test_permuting_a_group_permutes_its_weights_and_no_other_group_matters():
    batch, order = made_up_batch(), [2, 0, 3, 1, 4, 5, 6, 7]
    names = ("code_vectors", "codes", "advantages", "rewards", "entropies", "logps", "ref_logps")
    permuted = made_up_batch(**{name: getattr(batch, name)[order] for name in names})
    first = made_up_batch(**{name: getattr(batch, name)[:4] for name in names})
    weights = CriticalTokens().weigh(batch).advantage_weights
    torch.testing.assert_close(CriticalTokens().weigh(permuted).advantage_weights, weights[order], atol=1e-6, rtol=0)
    torch.testing.assert_close(CriticalTokens().weigh(first).advantage_weights, weights[:4], atol=1e-6, rtol=0)


def test_advantages_do_not_decide_which_tokens_count():
    batch = made_up_batch()
    assert torch.equal(
        CriticalTokens().choose(batch), CriticalTokens().choose(made_up_batch(advantages=-batch.advantages))
    )


def test_the_loss_is_the_mean_over_critical_tokens_with_its_gradient(checkpoint, tmp_path):
    """The authors' loss: sum of -(w * ratio * A - beta * KL) over critical tokens / how many they are, unclipped."""
    trainer = trainer_for(
        checkpoint, tmp_path, preset="grpo", token_weighting="critical", epsilon=10.0, learning_rate=1e-3
    )
    batch = scored_batch(trainer)
    batch["old_per_token_logps"] = batch["sampling_per_token_logps"]
    chosen = batch["kl_weights"] > 0
    assert chosen.sum(dim=1).tolist() == [9] * 8
    unweighted = batch["advantages"][chosen] / batch["kl_weights"][chosen]  # w * A

    def written_out(model, inputs):
        trainer._compute_loss(model, inputs)  # for its log-probabilities, which carry the gradient
        return loss

    def keep(*args, **kwargs):
        nonlocal loss
        scored = score(*args, **kwargs)
        ratio = (scored[0] - batch["old_per_token_logps"]).exp()[chosen]
        kl = objective.kl_k3(scored[0], batch["ref_per_token_logps"])[chosen]
        loss = -(ratio * unweighted - trainer.beta * kl).mean()
        return scored

    loss, score = torch.tensor(0.0), trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = keep
    expected = loss_and_gradients(trainer, batch, written_out)
    trainer._get_per_token_logps_and_entropies = score
    assert_same(loss_and_gradients(trainer, batch, trainer._compute_loss), expected, atol=2e-6)
    assert expected[0].abs() > 1e-4


def test_it_trains_beside_the_entropy_reward_and_moves_its_weights(checkpoint, tmp_path):
    trainer = trainer_for(checkpoint, tmp_path, preset="paper", token_weighting="critical", max_steps=2)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert [row["critical/mean"] for row in rows] == pytest.approx([0.25, 0.25])
    assert rows[0]["dynamic_weights/mean"] == pytest.approx(1, abs=1e-4)
    assert rows[1]["dynamic_weights/std"] > 1e-3 and rows[0]["dynamic_weights/std"] < 1e-4
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


def test_the_paper_map_names_functions_that_exist():
    page = Path(__file__).parents[1] / "docs" / "paper_map.md"
    names = set(re.findall(r"`critical\.(\w+)`", page.read_text(encoding="utf-8")))
    assert len(names) == 7 and all(callable(getattr(critical, name, None)) for name in names), names


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_share": 1.5}, r"first_share=1.5 is outside \[0, 1\]"),
        ({"last_share": -0.1}, r"last_share=-0.1 is outside"),
        ({"first_share": 0.0, "gradient_share": 0.0, "similarity_share": 0.0}, r"= 0; choose some tokens"),
        ({"similarity_share": 0.9}, r"= 1.1; choose some tokens, and at most all"),
        ({"gradient_share": 0.5, "last_share": 0.5}, r"gradient_share=0.5 does not fit between first_share=0.1"),
        ({"ratio_clip": -1.0}, r"ratio_clip=-1.0 must not be negative"),
        ({"average_over": "none"}, r"average_over='none' is unknown; use critical or all"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=rf"^token weighting 'critical' rejects its options .*{message}") as refused:
        build_weighting("critical", options)
    assert "\n" not in str(refused.value)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"grid=\(5, 5\) does not hold 36 tokens"):
        critical.entropy_gradients(torch.zeros(1, 36), (5, 5))
    with pytest.raises(ValueError, match=r"grid=\(1, 36\) has no gradient along a side of 1"):
        critical.entropy_gradients(torch.zeros(1, 36), (1, 36))
    with pytest.raises(ValueError, match=r"the shares choose none of 4 tokens; raise first_share to 0.25"):
        CriticalTokens().weigh(made_up_batch(grid=(2, 2)))
    with pytest.raises(ValueError, match=r"dynamic=True needs the reference's .*; set beta above 0 or dynamic: false"):
        CriticalTokens().weigh(made_up_batch(ref_logps=None))
