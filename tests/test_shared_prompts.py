"""Scoring a group with its prompt run once equals scoring every image after its own copy of the prompt."""

import pytest
import torch

from stage_grpo.policy import left_pad
from stage_grpo.policy.shared_prompts import unique_prompts
from stage_grpo.policy.steps import GenericSteps


def test_unique_prompts_by_hand():
    ids = torch.tensor([[9, 5, 6], [1, 2, 3], [9, 5, 6], [1, 2, 3], [9, 5, 6]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]])
    first, group = unique_prompts(ids, mask)
    # The last row has the same ids as the first, but its 9 is a token and no padding.
    assert sorted(first.tolist()) == [0, 1, 4]
    assert first[group].tolist() == [0, 1, 0, 1, 4]


def scored(policy, prompt_ids, codes, shares):
    """Features of the image positions and the gradient of every weight, for one and the same loss."""
    ids, mask = left_pad(prompt_ids, policy.pad_token_id)
    policy.shares_prompts = shares
    policy.zero_grad()
    features = policy.head_features(torch.cat([ids, codes], dim=1), policy.attention_mask_with_image(mask))
    signs = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features * signs).mean().backward()
    return features.detach(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("order", ["grouped", "shuffled", "all different"])
def test_features_and_gradients_are_those_of_copied_prompts(policy, prompt_ids, guidance, order):
    rows = prompt_ids[::3] if order == "all different" else prompt_ids
    if order == "shuffled":
        rows = [rows[i] for i in (7, 0, 11, 3, 1, 9, 4, 2, 10, 5, 8, 6)]
    codes = torch.randint(512, (len(rows), 36), generator=torch.Generator().manual_seed(1))
    policy.scoring_guidance = guidance
    copied, copied_gradients = scored(policy, rows, codes, shares=False)
    shared, shared_gradients = scored(policy, rows, codes, shares=True)
    torch.testing.assert_close(shared, copied, atol=2e-5, rtol=0)
    assert shared_gradients.keys() == copied_gradients.keys() and len(copied_gradients) > 10
    for name, gradient in copied_gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(shared_gradients[name], gradient, atol=1e-5 * scale + 1e-12, rtol=0)


def test_autocast_leaves_the_residual_stream_in_float32(policy, prompt_ids):
    """However a row is scored or sampled: a policy and its reference may go different ways, and are to agree."""
    seen = []
    for layer in policy.backbone.layers:
        layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
    codes = torch.randint(512, (len(prompt_ids), 36), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        copied, _ = scored(policy, prompt_ids, codes, shares=False)
        shared, _ = scored(policy, prompt_ids, codes, shares=True)
        steps = GenericSteps(policy, prompt_ids, guided=False)
        steps.advance(codes[:, 0])
    assert set(seen) == {torch.float32}
    exact, _ = scored(policy, prompt_ids, codes, shares=False)
    # Both round at the same places: neither may be further from float32 than the other.
    errors = [(found - exact).square().mean().item() for found in (copied, shared)]
    assert 0 < errors[1] < 1.05 * errors[0]


def test_gradients_are_the_same_to_the_bit_whenever_two_threads_add_them_up(policy, prompt_ids):
    rows = [[1] * 40 + ids for ids in prompt_ids] * 2
    codes = torch.randint(512, (len(rows), 36), generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _, first = scored(policy, rows, codes, shares=True)
        for _ in range(2):
            _, again = scored(policy, rows, codes, shares=True)
            assert all(torch.equal(again[name], gradient) for name, gradient in first.items())
    finally:
        torch.set_num_threads(threads)


def test_the_prompt_runs_once_a_group(policy, prompt_ids):
    """Counted where it matters: positions that pass through a layer's first product."""
    counted = []
    layer = policy.backbone.layers[0].self_attn.q_proj
    hook = layer.register_forward_hook(lambda _, inputs, __: counted.append(inputs[0].shape[:2].numel()))
    codes = torch.randint(512, (len(prompt_ids), 36))
    longest = max(map(len, prompt_ids))
    scored(policy, prompt_ids, codes, shares=True)
    assert counted == [4 * longest, 12 * 35]  # the last code predicts nothing
    counted.clear()
    scored(policy, prompt_ids, codes, shares=False)
    assert counted == [12 * (longest + 35)]
    hook.remove()


def test_a_trainer_shares_prompts_unless_it_recomputes_activations(checkpoint, tmp_path):
    from stage_grpo import StageConfig, StageTrainer
    from stage_grpo.data import to_dataset
    from stage_grpo.policy import load_policy
    from stage_grpo.types import PromptRow

    def trainer(**options):
        config = StageConfig(str(tmp_path), per_device_train_batch_size=4, num_generations=2, use_cpu=True, **options)
        rows = [PromptRow(f"a photo of {n} circles", {}) for n in range(4)]
        return StageTrainer(
            load_policy(checkpoint), lambda images, prompts, metadata: [0.0] * len(images), config, to_dataset(rows)
        )

    plain = trainer(gradient_checkpointing=False)
    assert plain.model.shares_prompts and plain.ref_model.shares_prompts
    assert not trainer(gradient_checkpointing=True).model.shares_prompts
