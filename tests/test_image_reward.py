"""ImageReward against the original's code on the same weights.

``image_reward_parity.npz`` holds what image-reward 1.5 (``ImageReward.score``) gave for the images, prompts,
vocabulary and weights that this file makes again; docs/rewards.md says how it was run.
"""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from original_janus import weight
from stage_grpo.rewards.clip_pixels import crop_pixels
from stage_grpo.rewards.image_reward import MAX_TOKENS, ImageReward
from stage_grpo.weights import MissingWeightsError
from stage_grpo.weights import convert_image_reward as converter

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = [(256, 256), (231, 224), (180, 300), (224, 224)]
IMAGES = [
    Image.fromarray(np.random.RandomState(100 + i).randint(0, 256, (height, width, 3)).astype(np.uint8))
    for i, (width, height) in enumerate(SIZES)
]
PROMPTS = ["a photo of the red cube", "Two cats, 3 dogs.", "the cat of " * 20, "a photo of the red cube"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, ".", ",", *(f"##{letter}" for letter in LETTERS)]
WORDS += ["red", "cube", "photo", "of", "the", "cat"]
MED = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "vocab_size": len(WORDS) + 2,
    "encoder_width": 768,  # the original overrides it, and so does the conversion
}
TRUE_MED = MED | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


@pytest.fixture(scope="module")
def original():
    return np.load(FIXTURES / "image_reward_parity.npz")


@pytest.fixture(scope="module")
def state(original):
    """Tensors under ImageReward's names, the same as the original was given."""
    made = {}
    for name, shape in json.loads(str(original["shapes"])).items():
        if name.endswith("position_ids"):
            made[name] = torch.arange(shape[-1])[None]
        else:
            made[name] = weight(name, shape) + float(name.endswith("LayerNorm.weight"))
    return made


def source_files(folder, state, med=None):
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(med or MED))
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, state):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("image_reward")
    converter.convert(source_files(source, state), out)
    return str(out)


@pytest.fixture(scope="module")
def reward(folder):
    return ImageReward(ImageReward.Options(weights=folder, device="cpu"))


def test_scores_equal_image_rewards_own(original, reward):
    np.testing.assert_allclose(reward.score(IMAGES, PROMPTS).scores, original["scores"], atol=1e-6)


def test_pixels_tokens_and_what_the_image_model_sees_are_the_originals(original, reward):
    pixels = torch.stack([crop_pixels(image, 224) for image in IMAGES])
    np.testing.assert_allclose(pixels[1, :, 100:120, 100:120].numpy(), original["pixels"], atol=1e-6)
    with torch.no_grad():
        seen = reward.vision(pixel_values=pixels).last_hidden_state
    np.testing.assert_allclose(seen[:, :2].numpy(), original["image_embeds"], atol=2e-6)
    ids = reward.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=MAX_TOKENS).input_ids
    assert ids == original["ids"].tolist()


def test_batches_and_order_change_nothing(folder, reward):
    together = reward.score(IMAGES, PROMPTS).scores
    single = ImageReward(ImageReward.Options(weights=folder, device="cpu", batch_size=1))
    np.testing.assert_allclose(single.score(IMAGES, PROMPTS).scores, together, atol=1e-6)
    backwards = reward.score(IMAGES[::-1], PROMPTS[::-1]).scores
    np.testing.assert_allclose(backwards[::-1], together, atol=1e-6)


def test_the_prompt_and_the_image_both_matter(reward):
    same_image = reward.score([IMAGES[0]] * 2, PROMPTS[:2]).scores
    same_prompt = reward.score(IMAGES[:2], [PROMPTS[0]] * 2).scores
    assert abs(same_image[0] - same_image[1]) > 1e-3 and abs(same_prompt[0] - same_prompt[1]) > 1e-3


def test_what_cannot_be_scored_is_nan_with_a_reason(reward):
    result = reward.score([IMAGES[0], Image.new("RGB", (3, 0))], PROMPTS[:2])
    assert result.scores[0] == pytest.approx(reward.score(IMAGES[:1], PROMPTS[:1]).scores[0], abs=1e-6)
    assert np.isnan(result.scores[1])
    assert result.details["reason"] == [None, "the image is empty, 3 x 0 pixels"]


def test_building_loads_nothing_and_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("STAGE_WEIGHTS", str(tmp_path))
    reward = ImageReward()
    with pytest.raises(MissingWeightsError, match="stage weights get image-reward"):
        reward.score(IMAGES[:1], PROMPTS[:1])


def test_every_tensor_of_the_true_image_reward_has_its_place(tmp_path, monkeypatch):
    """Names and shapes from image-reward 1.5; what is converted and what is left out make up the whole."""
    shapes = json.loads(gzip.decompress((FIXTURES / "image_reward_names.json.gz").read_bytes()))
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    models, heads = [], []
    for model_class in (BlipVisionModel, BlipTextModel):
        monkeypatch.setattr(model_class, "save_pretrained", lambda model, folder: models.append(model))
    monkeypatch.setattr(converter, "save_layers", lambda layers, file: heads.append(layers))
    monkeypatch.setattr(converter, "read_tensors", lambda file: state)
    (tmp_path / "med_config.json").write_text(json.dumps(TRUE_MED))
    files = {name: tmp_path / name for name in ("ImageReward.pt", "med_config.json")}
    converter.convert(files, tmp_path)

    left_out = sum(math.prod(shape) for name, shape in shapes.items() if "_proj." in name or "position_ids" in name)
    converted = sum(p.numel() for model in models for p in model.parameters())
    converted += sum(layer.numel() for layer in heads[0].values())
    assert converted + left_out == 446_666_465
    vision, text = models[0].config, models[1].config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (1024, 24, 224, 16)
    assert vision.layer_norm_eps == 1e-6
    assert (text.hidden_size, text.num_attention_heads, text.vocab_size, text.encoder_hidden_size) == (
        768,
        12,
        30524,
        1024,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blip.visual_encoder.blocks.1.norm1.bias": None}, r"BlipVisionModel.*layers\.1\.layer_norm1\.bias"),
        ({"blip.visual_encoder.head.weight": torch.zeros(1)}, r"BlipVisionModel.*head\.weight"),
        ({"blip.text_encoder.embeddings.word_embeddings.weight": None}, "lacks 'embeddings.word_embeddings.weight'"),
        ({"blip.visual_encoder.pos_embed": None}, "lacks 'pos_embed'"),
        ({"mlp.layers.7.bias": None}, "no linear layers"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(change, message, state, tmp_path):
    changed = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=f"(?s)ImageReward.pt.*{message}"):
        converter.convert(source_files(tmp_path, changed), tmp_path)


def test_a_missing_or_broken_config_is_named(state, tmp_path):
    files = source_files(tmp_path, state)
    files["med_config.json"].write_text("[1")
    with pytest.raises(ValueError, match=r"med_config\.json is no JSON object"):
        converter.convert(files, tmp_path)
    with pytest.raises(ValueError, match=r"med_config\.json is missing among ImageReward\.pt"):
        converter.convert({"ImageReward.pt": files["ImageReward.pt"]}, tmp_path)
