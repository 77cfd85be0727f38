from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, JanusForConditionalGeneration
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

from conftest import PROMPTS
from stage_grpo.policy import left_pad, load_policy
from stage_grpo.policy.base import guide, positions
from stage_grpo.policy.scoring_head import add_scoring_head


@torch.no_grad()
def logits_of(policy, prompt_ids, codes):
    """Teacher-forced image logits, one distribution an image token."""
    ids, mask = left_pad(prompt_ids, policy.pad_token_id)
    full = torch.cat([ids, codes], dim=1)
    features = policy.head_features(full, policy.attention_mask_with_image(mask))
    return policy.image_logits(features)


@pytest.fixture
def codes(policy, prompt_ids):
    return torch.randint(512, (len(prompt_ids), 36), generator=torch.Generator().manual_seed(1))


def test_prompt_is_janus_own_template_between_first_token_and_begin_of_image(policy, tokenizer):
    (ids,) = policy.encode_prompts(tokenizer, ["a photo of a cow"])
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<begin_of_image>")
    assert tokenizer.decode(ids[1:-1]) == "<|User|>: a photo of a cow\n\n<|Assistant|>:"
    (other,) = policy.encode_prompts(tokenizer, ["a photo of a cow"], "t2i_r1")
    assert tokenizer.decode(other[1:-1]) == "User: a photo of a cow\n\nAssistant:"


def test_unknown_template_and_empty_prompt_are_refused(policy, tokenizer):
    with pytest.raises(ValueError, match="'llama' is unknown; use one of"):
        policy.encode_prompts(tokenizer, ["a"], "llama")
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        policy.encode_prompts(tokenizer, ["a", " "])


def test_left_pad_and_positions_by_hand():
    ids, mask = left_pad([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions(mask).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_unconditional_row_keeps_first_and_last_token_and_its_own_length(policy):
    ids, mask = left_pad([[1, 20, 21, 4], [1, 20, 4]], policy.pad_token_id)
    blank = policy.unconditional_ids(ids, mask)
    pad = policy.pad_token_id
    assert blank.tolist() == [[1, pad, pad, 4], [pad, 1, pad, 4]]


def test_padding_never_changes_a_logit(policy, prompt_ids, codes):
    """The same row alone, unpadded, and in a batch with longer prompts."""
    together = logits_of(policy, prompt_ids, codes)
    alone = torch.cat([logits_of(policy, [ids], codes[i : i + 1]) for i, ids in enumerate(prompt_ids)])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


def test_conditional_logits_equal_transformers_language_model_and_head(policy, prompt_ids, codes):
    """Written out with the library's modules alone, one unpadded row at a time."""
    ids = torch.tensor(prompt_ids[:1])
    embeddings = torch.cat(
        [policy.get_input_embeddings()(ids), policy.prepare_embeddings_for_image_generation(codes[:1])], dim=1
    )
    with torch.no_grad():
        hidden = policy.model.language_model(inputs_embeds=embeddings).last_hidden_state
        expected = policy.model.generation_head(hidden[:, ids.shape[1] - 1 : -1])
    torch.testing.assert_close(logits_of(policy, prompt_ids[:1], codes[:1]), expected, atol=1e-5, rtol=0)


def test_guidance_mixes_features_exactly_as_it_mixes_logits(policy, prompt_ids, codes):
    conditional = logits_of(policy, prompt_ids, codes)
    ids, mask = left_pad(prompt_ids, policy.pad_token_id)
    blank = policy.unconditional_ids(ids, mask)
    blank_rows = [row[m.bool()].tolist() for row, m in zip(blank, mask)]
    expected = guide(conditional, logits_of(policy, blank_rows, codes), 3.0)
    policy.scoring_guidance = 3.0
    torch.testing.assert_close(logits_of(policy, prompt_ids, codes), expected, atol=5e-5, rtol=0)


def test_guide_by_hand():
    # uncond + 5 (cond - uncond): 1 + 5 (2 - 1) = 6 and 0 + 5 (-1 - 0) = -5
    mixed = guide(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]), 5.0)
    torch.testing.assert_close(mixed, torch.tensor([6.0, -5.0]), atol=1e-6, rtol=0)


def by_trl_alone(policy):
    add_fused_lm_head(policy, temperature=0.7, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy"))


def without_prompts(policy):
    add_scoring_head(policy, 0.7, torch.device("cpu"))


@pytest.mark.parametrize("add_head", [by_trl_alone, without_prompts])
def test_fused_head_of_trl_gives_the_image_heads_log_probabilities(policy, prompt_ids, codes, add_head, monkeypatch):
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 100)  # restored afterwards
    ids, mask = left_pad(prompt_ids, policy.pad_token_id)
    full, mask = torch.cat([ids, codes], dim=1), policy.attention_mask_with_image(mask)
    labels = full.masked_fill(torch.arange(full.shape[1]) < ids.shape[1], -100)
    add_head(policy)
    with torch.no_grad():
        out = policy(input_ids=full, attention_mask=mask, labels=labels, fused_lm_head=True)
    assert out.log_probs.shape[1] == (36 if add_head is without_prompts else full.shape[1] - 1)
    logps = torch.log_softmax(logits_of(policy, prompt_ids, codes) / 0.7, dim=-1)
    expected = logps.gather(-1, codes[..., None]).squeeze(-1)
    torch.testing.assert_close(out.log_probs[:, -36:], expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(out.entropy[:, -36:], -(logps.exp() * logps).sum(-1), atol=2e-5, rtol=0)


def test_only_the_language_model_trains(policy):
    training = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert training == {f"model.language_model.{name}" for name, _ in policy.model.language_model.named_parameters()}


def test_saved_checkpoint_is_plain_janus_with_the_same_weights(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(plain) is JanusForConditionalGeneration
    assert plain.config.architectures == ["JanusForConditionalGeneration"]
    expected = policy.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in plain.state_dict().items())


def test_decode_is_the_vq_model_scaled_to_bytes(policy, codes):
    with torch.no_grad():
        pixels = policy.model.vqmodel.decode(codes[:2])
    expected = np.clip((pixels.permute(0, 2, 3, 1).numpy() + 1) / 2 * 255, 0, 255).astype(np.uint8)
    # Convolutions of another layout differ in the last bit, which truncation can turn into one level.
    difference = np.abs(policy.decode(codes[:2]).numpy().astype(int) - expected)
    assert difference.max() <= 1 and (difference != 0).mean() < 1e-3
    assert expected.shape == (2, policy.image_size, policy.image_size, 3)


def test_code_vectors_are_codebook_rows_in_float32(policy, codes):
    codebook = policy.model.vqmodel.quantize.embedding.weight.detach()
    assert torch.equal(policy.to(torch.bfloat16).code_vectors(codes), codebook.to(torch.bfloat16)[codes].float())


def test_grid_and_size_come_from_the_checkpoint(policy):
    assert (policy.grid, policy.num_image_tokens, policy.image_size) == ((6, 6), 36, 48)


@pytest.mark.parametrize("model", ["no/such/folder/at/all", "./missing"])
def test_missing_checkpoint_is_named(model):
    with pytest.raises(ValueError, match=f"model='{Path(model)}' is not a folder"):
        load_policy(model)


def test_folder_without_config_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_policy(tmp_path)


def test_other_families_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is a 'llama'; supported families"):
        load_policy(tmp_path)


def test_prompts_of_the_fixture_differ_in_length(policy, tokenizer):
    assert len({len(ids) for ids in policy.encode_prompts(tokenizer, PROMPTS)}) > 2
