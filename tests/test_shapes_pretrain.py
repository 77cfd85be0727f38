"""The tiny policy: its config and tokenizer, its training loops at a toy budget, and the shipped weights."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, JanusForConditionalGeneration, JanusProcessor, JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from stage_grpo.policy.base import PROMPT_TEMPLATES
from stage_grpo.policy.loading import load_policy, load_tokenizer
from stage_grpo.rewards.registry import build_reward
from stage_grpo.shapes import policy_training, tiny
from stage_grpo.shapes import tokenizer_training as vq
from stage_grpo.shapes.policy_training import MIX, BatchSampler, EncodedScenes, encode_scenes, policy_loss
from stage_grpo.shapes.pretrain import pretrain
from stage_grpo.shapes.pretrain_config import PretrainConfig
from stage_grpo.shapes.prompts import CATEGORIES, mixed_rows, rows, rows_of, sample_scene
from stage_grpo.shapes.scenes import Scene, SceneObject, render

ASSET = Path(__file__).parents[1] / "assets" / "tiny-janus-shapes"
TOY = {
    "save_every": 2,
    "tokenizer_steps": 3,
    "tokenizer_batch_size": 2,
    "num_scenes": 24,
    "policy_steps": 3,
    "policy_batch_size": 4,
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_text_tokenizer()


@pytest.fixture(scope="module")
def untrained(tokenizer):
    torch.manual_seed(0)
    return tiny.build_policy(tokenizer)


@pytest.fixture(scope="module")
def shipped():
    return load_policy(ASSET)


def test_each_caption_word_is_one_token_and_any_text_survives(tokenizer):
    for row in rows("train") + rows("heldout"):
        assert len(tokenizer.tokenize(" " + row.prompt)) == len(row.prompt.split())
    for text in ("naïve 漢字 \u200b🙂 CAPS", "<|User|>: a photo of a ring\n\n<|Assistant|>:"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text


def test_the_tiny_policy_has_the_promised_size(untrained):
    # 36 codes of 8 x 8 pixels; 512 x 8 codebook; four blocks of 4 x 192 x 192 + 3 x 192 x 512 + 2 x 192 weights.
    assert untrained.num_image_tokens == 36 and untrained.grid == (6, 6)
    assert untrained.model.vqmodel.quantize.embedding.weight.shape == (512, 8)
    blocks = sum(p.numel() for p in untrained.model.language_model.layers.parameters())
    assert blocks == 4 * (4 * 192 * 192 + 3 * 192 * 512 + 2 * 192)
    assert 2.4e6 < sum(p.numel() for p in untrained.parameters()) < 2.7e6


def test_a_saved_policy_works_in_plain_transformers(untrained, tokenizer, tmp_path):
    tiny.save(untrained, tokenizer, tmp_path / "policy")
    model = JanusForConditionalGeneration.from_pretrained(tmp_path / "policy")
    for (name, mine), (_, theirs) in zip(untrained.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert model.generation_config.guidance_scale == tiny.GUIDANCE_SCALE
    boi = AutoTokenizer.from_pretrained(tmp_path / "policy").boi_token_id
    assert model.generation_config.generation_kwargs == {"boi_token_id": boi}
    processor = JanusProcessor.from_pretrained(tmp_path / "policy")
    prompts = ["a photo of a ring", "a photo of a red circle and a blue square"]
    texts = [PROMPT_TEMPLATES["janus"](prompt) for prompt in prompts]
    inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    mine = untrained.encode_prompts(tokenizer, prompts)
    assert [row[mask == 1].tolist() for row, mask in zip(inputs.input_ids, inputs.attention_mask)] == mine
    codes = model.generate(**inputs, generation_mode="image", do_sample=False)
    assert codes.shape == (2, 36) and codes.max() < 512


def test_the_processor_maps_pictures_to_the_tokenizer_s_range_and_back(tokenizer):
    processor = tiny.build_processor(tokenizer)
    picture = render(Scene((SceneObject("ring", "blue", "large", 24.0, 24.0),)))
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    expected = vq.to_pixels([Scene((SceneObject("ring", "blue", "large", 24.0, 24.0),))])
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_saving_keeps_foreign_files_and_leaves_no_scratch(untrained, tokenizer, tmp_path):
    target = tmp_path / "policy"
    target.mkdir()
    (target / "README.md").write_text("card")
    tiny.save(untrained, tokenizer, target)
    assert (target / "README.md").read_text() == "card"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_unit_codebook_rows_make_encode_and_decode_agree():
    torch.manual_seed(0)
    config = JanusVQVAEConfig(
        base_channels=32, channel_multiplier=[1, 1, 1, 1], num_res_blocks=0, latent_channels=32,
        embed_dim=8, num_embeddings=16, num_patches=6,
    )  # fmt: skip
    model = JanusVQVAE(config)
    vq.initialize(model, torch.Generator().manual_seed(0))
    codebook = vq.Codebook(model, vq.CodebookSettings())
    pixels = vq.to_pixels([vq.random_scene(np.random.default_rng(0)) for _ in range(2)])
    _, vectors, codes = vq.tokenizer_loss(model, codebook, pixels, 8.0)
    assert torch.equal(vq.encode(model, pixels).flatten(), codes)
    codebook.update(vectors, codes, torch.Generator().manual_seed(0))
    torch.testing.assert_close(codebook.rows.norm(dim=-1), torch.ones(16), atol=1e-6, rtol=0)


def test_codebook_rows_follow_their_vectors_by_hand():
    torch.manual_seed(0)
    config = JanusVQVAEConfig(
        base_channels=32, channel_multiplier=[1], num_res_blocks=0, embed_dim=2, num_embeddings=3
    )
    model = JanusVQVAE(config)
    model.quantize.embedding.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    codebook = vq.Codebook(model, vq.CodebookSettings(decay=0.5))
    vectors, codes = torch.tensor([[0.6, 0.8], [0.6, 0.8]]), torch.tensor([0, 0])
    codebook.update(vectors, codes, torch.Generator(), revive=False)
    # Row 0: (1, 0) / 2 + (1.2, 1.6) / 2 = (1.1, 0.8), then to unit length; rows nobody chose stay.
    expected = torch.stack([F.normalize(torch.tensor([1.1, 0.8]), dim=0), *torch.tensor([[0.0, 1.0], [-1.0, 0.0]])])
    torch.testing.assert_close(codebook.rows.detach(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(codebook.counts, torch.tensor([1.5, 0.5, 0.5]), atol=1e-6, rtol=0)


def test_idle_codes_are_revived_from_what_is_badly_coded():
    config = JanusVQVAEConfig(
        base_channels=32, channel_multiplier=[1], num_res_blocks=0, embed_dim=2, num_embeddings=2
    )
    model = JanusVQVAE(config)
    model.quantize.embedding.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    codebook = vq.Codebook(model, vq.CodebookSettings(decay=0.0))
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    codebook.update(vectors, torch.tensor([0, 0, 0]), torch.Generator().manual_seed(0))
    torch.testing.assert_close(codebook.rows[1].detach(), torch.tensor([-1.0, 0.0]), atol=1e-5, rtol=0)


def test_foreground_weights_by_hand():
    pixels = torch.full((1, 3, 5, 5), 0.8)
    pixels[0, 2, 2, 2] = -1.0
    weight = vq.foreground_weight(pixels, 8.0)[0, 0]
    assert weight.tolist() == [[1] * 5, [1, 8, 8, 8, 1], [1, 8, 8, 8, 1], [1, 8, 8, 8, 1], [1] * 5]
    assert vq.foreground_weight(pixels, 8.0, margin=0).sum() == 24 + 8


def test_encoded_scenes_mark_the_tokens_that_shapes_cover(untrained):
    made = encode_scenes(untrained.model.vqmodel, "counting", 8, seed=0)
    prompts = rows_of("counting", "train")
    for i in range(8):
        assert made.foreground[i].sum() == 4 * prompts[int(made.captions[i])].metadata["include"][0]["count"]
    again = encode_scenes(untrained.model.vqmodel, "counting", 8, seed=0)
    assert torch.equal(made.codes, again.codes) and torch.equal(made.captions, again.captions)


def test_the_policy_loss_is_the_mean_of_what_the_head_says(untrained, tokenizer):
    ids = torch.tensor(untrained.encode_prompts(tokenizer, ["a photo of a ring"]))
    codes = torch.randint(0, 512, (1, 36), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = untrained.head_features(torch.cat([ids, codes], 1), torch.ones(1, ids.shape[1] + 36).long())
        logps = untrained.image_logits(features).log_softmax(-1)
        own = -logps.gather(-1, codes[..., None]).squeeze(-1)
        even = policy_loss(untrained, ids, torch.ones_like(ids), codes, torch.ones(1, 36))
        first = policy_loss(untrained, ids, torch.ones_like(ids), codes, torch.eye(36)[:1])
    torch.testing.assert_close(even, own.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(first, own[0, 0], atol=1e-5, rtol=0)


def test_batches_follow_the_mix_and_drop_captions(untrained, tokenizer):
    shape = (4, 36)
    sets = {
        tag: EncodedScenes(torch.full(shape, i, dtype=torch.int16), torch.zeros(shape).bool(), torch.zeros(4).long())
        for i, tag in enumerate(CATEGORIES)
    }
    sampler = BatchSampler(untrained, tokenizer, sets)
    ids, mask, codes, _ = sampler.sample(np.random.default_rng(0), 4000, progress=0.9)
    shares = codes[:, 0].bincount(minlength=6) / 4000
    # Standard error of a share is below 0.008.
    torch.testing.assert_close(shares, torch.tensor([MIX[tag] for tag in CATEGORIES]), atol=0.03, rtol=0)
    blank = (ids == untrained.unconditional_ids(ids, mask)).all(-1)
    assert 0.08 < blank.float().mean() < 0.12
    whole = (codes[:, 0] == 0) & ~blank
    expected = untrained.encode_prompts(tokenizer, [rows_of("single_object", "train")[0].prompt])[0]
    assert ids[whole][0][mask[whole][0] == 1].tolist() == expected


def test_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    straight = pretrain(PretrainConfig(out=str(tmp_path / "straight"), **TOY))
    calls = {"left": 2}
    update = vq.Codebook.update

    def stop(self, *args, **kwargs):
        if calls["left"] == 0:
            raise KeyboardInterrupt
        calls["left"] -= 1
        update(self, *args, **kwargs)

    config = PretrainConfig(out=str(tmp_path / "resumed"), **TOY)
    monkeypatch.setattr(vq.Codebook, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    monkeypatch.setattr(vq.Codebook, "update", update)
    resumed = pretrain(config)
    first, second = (load_file(out / "model.safetensors") for out in (straight, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Once more: nothing is left to do, nothing changes.
    third = load_file(pretrain(config) / "model.safetensors")
    assert all(torch.equal(first[name], third[name]) for name in first)
    with pytest.raises(ValueError, match="begun with seed=0, not 1"):
        pretrain(PretrainConfig(out=str(tmp_path / "resumed"), seed=1, **TOY))


def test_the_policy_stage_resumes_in_its_middle(tmp_path):
    out = tmp_path / "run"
    whole = load_file(pretrain(PretrainConfig(out=str(out), **TOY)) / "model.safetensors")
    # Begin anew with a checkpoint after step 2 of 3 in place: what a crash in step 3 would leave.
    kept = tmp_path / "kept"
    saved = []
    original = policy_training.save_state

    def keep(folder, *args):
        original(folder, *args)
        saved.append(shutil.copytree(folder, kept / str(len(saved))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_training, "save_state", keep)
        shutil.rmtree(out / "checkpoints" / "policy")
        pretrain(PretrainConfig(out=str(out), **TOY))
    shutil.rmtree(out / "checkpoints" / "policy")
    shutil.copytree(saved[0], out / "checkpoints" / "policy")
    resumed = load_file(pretrain(PretrainConfig(out=str(out), **TOY)) / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_torn_checkpoint_is_named(tmp_path):
    config = PretrainConfig(out=str(tmp_path), **TOY)
    folder = tmp_path / "checkpoints" / "tokenizer"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="tokenizer is not a readable checkpoint"):
        pretrain(config)


@pytest.mark.parametrize(
    ("field", "value"), [("policy_steps", 0), ("tokenizer_lr", -1.0), ("seed", -1), ("out", ""), ("threads", 0)]
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        PretrainConfig(**{field: value})


def test_the_shipped_files_are_small_and_complete():
    assert (ASSET / "model.safetensors").stat().st_size <= 12e6
    assert (ASSET / "README.md").read_text(encoding="utf-8").startswith("---")
    stored = load_file(ASSET / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_the_shipped_tokenizer_keeps_scenes_recognisable(shipped):
    prompts, rng = mixed_rows("heldout", [1] * 6, 150), np.random.default_rng(0)
    pixels = vq.to_pixels([sample_scene(row, rng) for row in prompts])
    shown = shipped.decode(vq.encode(shipped.model.vqmodel, pixels)).numpy()
    reward = build_reward("shapes", {"strict": True})
    result = reward.score(
        [Image.fromarray(image) for image in shown], [r.prompt for r in prompts], [r.metadata for r in prompts]
    )
    assert np.mean(result.scores) >= 0.95


def test_the_shipped_text_tokenizer_is_the_built_one(shipped, tokenizer):
    assert load_tokenizer(shipped).get_vocab() == tokenizer.get_vocab()
