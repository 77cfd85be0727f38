"""The reference policy: from another checkpoint, refused where it does not fit, and synced with the policy."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.trainer import grpo_trainer

from original_janus import copy_folder, tiny_weights, write_original
from stage_grpo.policy import load_policy, load_tokenizer
from stage_grpo.policy.janus import JanusPolicy
from stage_grpo.shapes import tiny
from stage_grpo.trainer import StageTrainer
from stage_grpo.trl_seams import check_reference, reference_of
from test_trainer import brightness, config, dataset, logged, trainer_for


def disturbed(policy, scale=0.03):
    """The same policy with other weights in its language model."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.backbone.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def other(checkpoint, tmp_path_factory):
    """A checkpoint that differs from the policy's in its weights alone."""
    policy = disturbed(load_policy(checkpoint))
    folder = tmp_path_factory.mktemp("other")
    tiny.save(policy, load_tokenizer(policy), folder)
    return str(folder)


def batch_of(stage):
    stage.model.train()
    stage.current_gradient_accumulation_steps = 1
    rows = [dict(row) for row in stage.train_dataset.select(range(2)) for _ in range(4)]
    return stage._generate_and_score_completions(rows)


@torch.no_grad()
def scores(policy, batch):
    """Log-probabilities and entropies of a batch's images, written out."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logps = torch.log_softmax(policy.image_logits(policy.head_features(ids, mask)), dim=-1)
    chosen = logps.gather(-1, batch["completion_ids"][..., None]).squeeze(-1)
    return chosen, -(logps.exp() * logps).sum(-1)


def k3(logps, ref_logps):
    return ((ref_logps - logps).exp() - (ref_logps - logps) - 1).mean().item()


def test_the_reference_scores_with_the_weights_of_the_other_checkpoint(checkpoint, other, tmp_path):
    stage = trainer_for(checkpoint, tmp_path, ref_model=other, entropy_loss_weight=0.1)
    batch = batch_of(stage)
    logps, entropies = scores(load_policy(other), batch)
    own, _ = scores(load_policy(checkpoint), batch)
    torch.testing.assert_close(batch["ref_per_token_logps"], logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch["ref_entropy"], entropies.mean(1), atol=1e-5, rtol=0)
    assert (own - logps).abs().mean() > 0.05
    stage._compute_loss(stage.model, batch)
    assert stage._metrics["train"]["kl"][-1] == pytest.approx(k3(own, logps), abs=1e-5)
    assert not any(
        parameter.requires_grad and parameter.grad is not None for parameter in stage.ref_model.parameters()
    )


def test_kl_and_entropy_gap_are_there_at_step_one_and_the_reference_stays(checkpoint, other, tmp_path):
    stage = trainer_for(checkpoint, tmp_path, ref_model=other, max_steps=2)
    stage.train()
    first = logged(tmp_path)[0]
    assert first["kl"] > 1e-3 and first["entropy/gap"] > 1e-4
    wanted = load_policy(other).state_dict()
    for name, value in stage.ref_model.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_a_policy_from_memory_needs_a_reference_that_is_named(checkpoint, other, tmp_path):
    def trainer(**changes):
        policy = load_policy(checkpoint)
        tokenizer = load_tokenizer(policy)
        policy.config.name_or_path = ""
        args = config(tmp_path, max_steps=1, **changes)
        return StageTrainer(policy, brightness, args, dataset(), processing_class=tokenizer)

    with pytest.raises(ValueError, match="name its checkpoint as ref_model"):
        trainer()
    stage = trainer(ref_model=other)
    batch = batch_of(stage)
    torch.testing.assert_close(batch["ref_per_token_logps"], scores(load_policy(other), batch)[0], atol=1e-5, rtol=0)


def test_a_reference_in_the_original_format(converted, tmp_path):
    """Converted once beside the original; the weights are the original's, not the policy's."""
    weights = {name: value + 0.25 for name, value in tiny_weights().items()}
    original = write_original(tmp_path / "original", weights)
    policy = load_policy(converted)
    with reference_of(policy, str(original)):
        reference = grpo_trainer.create_model_from_path(policy.config.name_or_path, dtype=torch.float32)
    assert type(reference) is JanusPolicy and (tmp_path / "original.transformers").is_dir()
    embedding = weights["language_model.model.embed_tokens.weight"]
    assert torch.equal(reference.get_input_embeddings().weight, embedding)
    assert not torch.equal(policy.get_input_embeddings().weight, embedding)


def test_the_reference_is_loaded_as_the_policy_was(policy, other):
    with reference_of(policy, other):
        reference = grpo_trainer.create_model_from_path("", dtype=torch.bfloat16, attn_implementation="eager")
    assert reference.dtype == torch.bfloat16 and reference.config._attn_implementation == "eager"


def resized(monkeypatch, tokenizer, **changes):
    """An untrained policy of the tiny architecture with other sizes."""
    text = changes.pop("text", {})
    with monkeypatch.context() as patch:
        for name, value in changes.items():
            patch.setattr(tiny, name, value)
        sizes = tiny.build_config(tokenizer)
    for name, value in text.items():
        setattr(sizes.text_config, name, value)
    return JanusPolicy(sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NUM_CODES": 256}, "codebook size is 256, that of the policy 512"),
        ({"IMAGE_SIZE": 32, "NUM_TOKENS": 16}, "number of image tokens is 16, that of the policy 36"),
        ({"text": {"vocab_size": 700}}, "vocabulary size is 700, that of the policy {vocabulary}"),
    ],
)
def test_a_reference_of_other_prompts_or_images_is_refused(
    checkpoint, tokenizer, tmp_path, monkeypatch, changes, message
):
    folder = tmp_path / "reference"
    resized(monkeypatch, tokenizer, **changes).save_pretrained(folder)
    with pytest.raises(ValueError) as caught:
        trainer_for(checkpoint, tmp_path / "run", ref_model=str(folder))
    text = str(caught.value)
    vocabulary = load_policy(checkpoint).config.text_config.vocab_size
    assert message.format(vocabulary=vocabulary) in text and str(folder) in text and checkpoint in text
    assert "\n" not in text


def test_a_reference_of_another_family_is_refused(policy):
    class Foreign(JanusPolicy):
        pass

    with pytest.raises(ValueError, match=r"'x'.*its class is Foreign, that of the policy JanusPolicy"):
        check_reference(Foreign(policy.config), policy, "x")


def test_a_larger_model_may_be_the_reference_but_not_be_synced(policy, tokenizer, monkeypatch):
    larger = resized(monkeypatch, tokenizer, text={"num_hidden_layers": 3})
    check_reference(larger, policy, "larger")
    with pytest.raises(ValueError, match=r"its model.language_model.layers.2\S+ is \(.*\), that of the policy none"):
        check_reference(larger, policy, "larger", synced=True)


def test_references_that_cannot_be_loaded_are_named(checkpoint, other, tmp_path):
    with pytest.raises(ValueError, match=r"ref_model='.*nowhere' cannot be the reference policy: .*is not a folder"):
        trainer_for(checkpoint, tmp_path, ref_model=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"ref_model='.*empty' cannot be the reference policy: .*no config.json"):
        trainer_for(checkpoint, tmp_path, ref_model=str(tmp_path / "empty"))
    torn = copy_folder(Path(other), tmp_path / "torn")
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"ref_model='.*torn' cannot be the reference policy: .*torn, fetch"):
        trainer_for(checkpoint, tmp_path, ref_model=str(torn))


@pytest.mark.parametrize("changes", [{"use_peft": True}, {"beta": 0.0, "preset": "grpo"}])
def test_a_reference_that_would_not_be_used_is_refused(tmp_path, other, changes):
    with pytest.raises(ValueError, match="ref_model="):
        config(tmp_path, ref_model=other, **changes)


def test_a_reference_beside_adapters_is_refused(checkpoint, other, tmp_path):
    adapters = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"ref_model='\S+' does not go with adapters.*leave ref_model out, or"):
        trainer_for(checkpoint, tmp_path, ref_model=other, peft_config=adapters)
    with pytest.raises(ValueError, match="does not go with adapters"):
        wrapped = get_peft_model(load_policy(checkpoint), adapters)
        StageTrainer(wrapped, brightness, config(tmp_path, ref_model=other), dataset())


def test_options_that_only_the_reference_would_take_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model_init_kwargs=\{'dtype': 'bfloat16'\} is not supported.*set dtype and"):
        config(tmp_path, model_init_kwargs={"dtype": "bfloat16"})


def test_guided_scoring_by_a_reference_whose_checkpoint_names_no_pad_token(checkpoint, tmp_path):
    """The tokenizer knows it; the policy has it from there, and so must the reference."""
    folder = copy_folder(Path(checkpoint), tmp_path / "padless")
    sizes = json.loads((folder / "config.json").read_text())
    assert sizes["text_config"].pop("pad_token_id") is not None
    (folder / "config.json").write_text(json.dumps(sizes))
    stage = trainer_for(str(folder), tmp_path / "run", guidance_in_scoring=True)
    batch = batch_of(stage)
    torch.testing.assert_close(batch["sampling_per_token_logps"], batch["ref_per_token_logps"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("named", [False, True])
def test_a_synced_reference_mixes_the_policy_in_and_is_what_kl_is_measured_against(checkpoint, other, tmp_path, named):
    def synced(max_steps):
        return trainer_for(
            checkpoint,
            tmp_path / str(max_steps),
            ref_model=other if named else None,
            sync_ref_model=True,
            ref_model_sync_steps=2,
            ref_model_mixup_alpha=0.6,
            max_steps=max_steps,
            entropy_loss_weight=0.1,
        )

    stage = synced(1)
    before = {name: value.clone() for name, value in stage.ref_model.state_dict().items()}
    stage.train()
    for name, value in stage.ref_model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} moved before its step"
    stage = synced(2)
    stage.train()
    policy = stage.model.state_dict()
    mixed = {name: 0.6 * policy[name] + 0.4 * value for name, value in before.items()}
    moved = 0
    for name, value in stage.ref_model.state_dict().items():
        torch.testing.assert_close(value, mixed[name], atol=1e-6, rtol=0)
        moved += not torch.equal(value, before[name])
    assert moved > 20
    reference = load_policy(checkpoint)
    reference.load_state_dict(mixed)
    batch = batch_of(stage)
    logps, entropies = scores(reference, batch)
    own, _ = scores(stage.model, batch)
    torch.testing.assert_close(batch["ref_per_token_logps"], logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch["ref_entropy"], entropies.mean(1), atol=1e-5, rtol=0)
    stage._compute_loss(stage.model, batch)
    assert stage._metrics["train"]["kl"][-1] == pytest.approx(k3(own, logps), abs=1e-6)
    assert k3(own, logps) > 1e-6
