import numpy as np
import pytest
import torch

from stage_grpo.policy import left_pad
from stage_grpo.policy.steps import prefill
from stage_grpo.rollout import bytes_per_row, decode_images, rollout
from stage_grpo.sampling import Sampling, image_uniforms, sample_codes
from test_policy import logits_of

GUIDED = Sampling(guidance_scale=3.0)


@pytest.fixture
def uniforms(prompt_ids):
    return image_uniforms([(0, i) for i in range(len(prompt_ids))], 36)


@pytest.fixture
def sampled(policy, prompt_ids, uniforms):
    return rollout(policy, prompt_ids, uniforms, GUIDED)


@pytest.mark.parametrize("sampling", [Sampling(3.0, top_k=1), Sampling(3.0, temperature=1e-4)])
def test_greedy_rollout_equals_transformers_generate(policy, prompt_ids, uniforms, tokenizer, sampling):
    ids, mask = left_pad(prompt_ids, policy.pad_token_id)
    expected = policy.generate(
        inputs=ids, attention_mask=mask, generation_mode="image", do_sample=False, guidance_scale=3.0
    )
    assert torch.equal(rollout(policy, prompt_ids, uniforms, sampling).codes, expected)


def test_recorded_log_probabilities_equal_teacher_forced_ones(policy, prompt_ids, sampled):
    logps = torch.log_softmax(logits_of(policy, prompt_ids, sampled.codes), dim=-1)
    expected = logps.gather(-1, sampled.codes[..., None]).squeeze(-1)
    torch.testing.assert_close(sampled.logps, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(sampled.entropies, -(logps.exp() * logps).sum(-1), atol=1e-4, rtol=0)


def test_recorded_guided_log_probabilities_equal_guided_scoring(policy, prompt_ids, sampled):
    policy.scoring_guidance = 3.0
    logps = torch.log_softmax(logits_of(policy, prompt_ids, sampled.codes), dim=-1)
    expected = logps.gather(-1, sampled.codes[..., None]).squeeze(-1)
    torch.testing.assert_close(sampled.guided_logps, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(sampled.guided_entropies, -(logps.exp() * logps).sum(-1), atol=1e-4, rtol=0)


def test_guidance_changes_the_distribution(sampled):
    assert (sampled.logps - sampled.guided_logps).abs().max() > 0.1


def test_temperature_scales_recorded_log_probabilities(policy, prompt_ids, uniforms):
    sampled = rollout(policy, prompt_ids, uniforms, Sampling(3.0, temperature=0.5))
    logps = torch.log_softmax(logits_of(policy, prompt_ids, sampled.codes) / 0.5, dim=-1)
    expected = logps.gather(-1, sampled.codes[..., None]).squeeze(-1)
    torch.testing.assert_close(sampled.logps, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows_per_chunk", [1, 5])
def test_micro_batching_changes_nothing(policy, prompt_ids, uniforms, sampled, rows_per_chunk):
    budget = rows_per_chunk * bytes_per_row(policy, max(map(len, prompt_ids)), guided=True)
    again = rollout(policy, prompt_ids, uniforms, GUIDED, budget)
    assert torch.equal(again.codes, sampled.codes)
    torch.testing.assert_close(again.guided_logps, sampled.guided_logps, atol=5e-5, rtol=0)


def test_batch_composition_and_order_change_nothing(policy, prompt_ids, uniforms, sampled):
    rows = [7, 0, 10]
    again = rollout(policy, [prompt_ids[i] for i in rows], uniforms[rows], GUIDED)
    assert torch.equal(again.codes, sampled.codes[rows])


def test_shared_prefix_equals_a_prefix_a_row(policy, prompt_ids):
    shared = prefill(policy, prompt_ids, guided=True)
    own = [prefill(policy, [ids], guided=True) for ids in prompt_ids]
    conditional = torch.cat([state.hidden[:1] for state in own])
    unconditional = torch.cat([state.hidden[1:] for state in own])
    torch.testing.assert_close(shared.hidden, torch.cat([conditional, unconditional]), atol=2e-5, rtol=0)
    assert shared.position_ids.flatten().tolist() == 2 * [len(ids) for ids in prompt_ids]


def test_each_unique_prompt_is_run_once(policy, prompt_ids, monkeypatch):
    batches = []
    forward = policy.backbone.forward
    monkeypatch.setattr(
        policy.backbone, "forward", lambda **kw: batches.append(len(kw["inputs_embeds"])) or forward(**kw)
    )
    prefill(policy, prompt_ids, guided=True)
    assert batches == [2 * 4]


def test_a_rollout_can_be_replayed_and_another_seed_differs(policy, prompt_ids, uniforms, sampled):
    assert torch.equal(rollout(policy, prompt_ids, uniforms, GUIDED).codes, sampled.codes)
    other = image_uniforms([(1, i) for i in range(len(prompt_ids))], 36)
    assert not torch.equal(rollout(policy, prompt_ids, other, GUIDED).codes, sampled.codes)


def test_no_guidance_samples_the_conditional_distribution(policy, prompt_ids, uniforms):
    plain = rollout(policy, prompt_ids, uniforms, Sampling(guidance_scale=1.0))
    assert torch.equal(plain.logps, plain.guided_logps)
    logps = torch.log_softmax(logits_of(policy, prompt_ids, plain.codes), dim=-1)
    expected = logps.gather(-1, plain.codes[..., None]).squeeze(-1)
    torch.testing.assert_close(plain.logps, expected, atol=1e-4, rtol=0)


def test_rollout_leaves_the_training_mode_and_gradients_alone(policy, prompt_ids, uniforms):
    policy.train()
    sampled = rollout(policy, prompt_ids, uniforms, GUIDED)
    assert policy.training and not sampled.logps.requires_grad and torch.is_grad_enabled()


def test_wrong_number_of_random_numbers_is_refused(policy, prompt_ids):
    with pytest.raises(ValueError, match=r"uniforms of shape \(2, 36\) do not fit 12 prompts"):
        rollout(policy, prompt_ids, torch.zeros(2, 36, dtype=torch.float64), GUIDED)


def test_bfloat16_weights_still_give_float32_records(policy, prompt_ids, uniforms):
    sampled = rollout(policy.to(torch.bfloat16), prompt_ids, uniforms, GUIDED)
    assert sampled.logps.dtype == torch.float32
    # bfloat16 has 8 bits: rounded log-probabilities of about -4 would all be multiples of 1/64.
    assert (sampled.logps * 64 % 1 != 0).float().mean() > 0.9


def test_decoding_in_chunks_equals_decoding_at_once(policy, sampled):
    at_once = policy.decode(sampled.codes).numpy()
    in_chunks = decode_images(policy, sampled.codes, budget=5 * policy.decode_bytes_per_image)
    # Convolution kernels differ by batch size in the last bit, which truncation can turn into one level.
    assert np.abs(at_once.astype(int) - in_chunks.astype(int)).max() <= 1
    assert (at_once != in_chunks).mean() < 1e-3


def test_streams_are_named_by_their_key_alone():
    together = image_uniforms([(3, 0, 1), (3, 0, 2)], 5)
    assert torch.equal(together[1:], image_uniforms([(3, 0, 2)], 5))
    assert not torch.equal(together[0], together[1])


def test_inverse_cdf_by_hand():
    # Probabilities 0.5, 0.3, 0.2: cumulative 0.5, 0.8, 1.
    logps = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(5, 1)
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.999], dtype=torch.float64)
    assert sample_codes(logps, uniforms, Sampling()).tolist() == [0, 0, 1, 1, 2]
    # top_k=2 leaves 0.5 and 0.3, renormalised to 0.625 and 0.375.
    assert sample_codes(logps, uniforms, Sampling(top_k=2)).tolist() == [0, 0, 0, 1, 1]
    # top_p=0.6: the first code has 0.5, so the second is needed too.
    assert sample_codes(logps, uniforms, Sampling(top_p=0.6)).tolist() == [0, 0, 0, 1, 1]
    # min_p=0.5 drops what is below half of 0.5.
    assert sample_codes(logps, uniforms, Sampling(min_p=0.5)).tolist() == [0, 0, 0, 1, 1]


def test_a_code_of_probability_zero_is_never_drawn():
    logps = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for u in (0.0, 0.5, 1 - 2**-53):
        assert sample_codes(logps, torch.tensor([u], dtype=torch.float64), Sampling()).item() == 1


def test_sampled_frequencies_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    logps = torch.log_softmax(torch.randn(1, 8, generator=generator), dim=-1)
    uniforms = torch.rand(40_000, generator=generator, dtype=torch.float64)
    drawn = sample_codes(logps.expand(len(uniforms), -1), uniforms, Sampling())
    counts = torch.bincount(drawn, minlength=8) / len(uniforms)
    # Five standard errors of a share of at most 1/2 are 5 * 0.5 / sqrt(40000) = 0.0125.
    torch.testing.assert_close(counts, logps.exp()[0], atol=0.0125, rtol=0)


@pytest.mark.parametrize(
    ("field", "value"), [("guidance_scale", 0.5), ("temperature", 0.0), ("top_k", -1), ("top_p", 0.0), ("min_p", 1.0)]
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        Sampling(**{field: value})
