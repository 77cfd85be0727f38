"""The judge reward and its conversion, against LLaVA-NeXT and transformers' own path for several pictures.

``orm_parity.npz`` holds what LLaVA-NeXT's code answers, called as T2I-R1 calls it, for weights made from their names;
docs/rewards.md says how it was run.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SiglipImageProcessorPil,
)

from original_gdino import FIXTURES, picture
from original_janus import weight
from stage_grpo.rewards.orm import OrmOptions, OrmReward
from stage_grpo.rewards.orm_model import AFTER_IMAGE, BEFORE_IMAGE, JudgeModel, pad_to_square
from stage_grpo.weights.convert_orm import convert, read_config
from tiny_orm import IMAGE_TOKEN, TEXT, VISION, write_tokenizer

IMAGES = [picture(seed, size) for seed, size in enumerate([(42, 42), (42, 60), (28, 28), (50, 30)])]
PROMPTS = ["a red cup", "two dogs left of a very long bench {x}", "", "no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orm")
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=VISION, text_config=TEXT, image_token_index=IMAGE_TOKEN, video_token_index=IMAGE_TOKEN + 1
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    half = [0.5, 0.5, 0.5]
    SiglipImageProcessorPil(size={"height": 42, "width": 42}, image_mean=half, image_std=half).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(folder):
    return JudgeModel(folder, "cpu", "float32")


def pixels_of(image):
    """Pixels (1, 3, 42, 42) in [-1, 1] as LLaVA-NeXT makes them: middle of a grey square, resized, rescaled."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    resized = np.asarray(square.resize((42, 42), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy(((resized / 255 - 0.5) / 0.5).transpose(2, 0, 1))[None]


def features_of(judge, image):
    """What transformers makes of one of two pictures in a sample: then, and only then, each is a single patch."""
    twice = pixels_of(image).repeat(2, 1, 1, 1)
    features = judge._model.model.get_image_features(
        twice, image_sizes=torch.tensor([[42, 42]] * 2), batch_num_images=torch.tensor([2])
    )
    return features.pooler_output[0]


def logits_by_transformers(judge, image, prompt):
    """Logits behind the question by transformers' forward, with placeholders for the picture."""
    tokenizer = judge._tokenizer
    before, after = (tokenizer(text).input_ids for text in (BEFORE_IMAGE, AFTER_IMAGE.format(prompt=prompt)))
    features = features_of(judge, image)
    ids = torch.tensor([[*before, *[IMAGE_TOKEN] * len(features), *after]])
    packed = type("Features", (), {"pooler_output": [features]})()
    return judge._model(input_ids=ids, mm_encoder_outputs={"image": packed}).logits[0, -1].double()


@torch.no_grad()
def test_answers_equal_transformers_forward(judge):
    answer = judge.yes_or_no(IMAGES, PROMPTS)
    yes, no = judge._tokenizer.convert_tokens_to_ids(["yes", "no"])
    for index, (image, prompt) in enumerate(zip(IMAGES, PROMPTS)):
        logits = logits_by_transformers(judge, image, prompt)
        assert answer.gap[index] == pytest.approx(float(logits[yes] - logits[no]), abs=2e-6)
        either = logits.softmax(-1)[[yes, no]].sum()
        assert answer.p_either[index] == pytest.approx(float(either), abs=1e-6)
    assert np.ptp(answer.gap) > 0.05  # pictures and prompts are told apart


@torch.no_grad()
def test_a_picture_is_the_encoders_state_before_its_last_norm(judge):
    tower = judge._model.model.vision_tower
    hidden = tower.embeddings(pixels_of(IMAGES[1]))
    for layer in tower.encoder.layers:
        hidden = layer(hidden, attention_mask=None)
    expected = judge._model.model.multi_modal_projector(hidden)[0]
    tokens = judge._picture_tokens([IMAGES[1]])[0]
    np.testing.assert_allclose(tokens[:-1].numpy(), expected.numpy(), atol=1e-6)
    np.testing.assert_allclose(tokens[-1].numpy(), judge._model.model.image_newline.numpy(), atol=0)
    assert len(tokens) == 3 * 3 + 1


def test_batches_change_nothing(judge):
    together = judge.yes_or_no(IMAGES, PROMPTS)
    alone = [judge.yes_or_no([image], [prompt]) for image, prompt in zip(IMAGES, PROMPTS)]
    np.testing.assert_allclose(together.gap, [answer.gap[0] for answer in alone], atol=2e-6)


def test_score_is_the_probability_of_yes(folder, judge):
    options = {"weights": str(folder), "device": "cpu", "dtype": "float32", "batch_size": 3}
    gap = judge.yes_or_no(IMAGES, PROMPTS).gap.astype(np.float64)
    for temperature in (1.0, 0.3):
        reward = OrmReward(OrmOptions(temperature=temperature, **options))
        result = reward.score(IMAGES, PROMPTS)
        p = np.exp(gap / temperature) / (np.exp(gap / temperature) + 1)
        np.testing.assert_allclose(result.scores, p, atol=2e-6)
        np.testing.assert_array_equal(reward.score(IMAGES, PROMPTS).scores, result.scores)
    assert OrmReward(OrmOptions(**options)).score([], []).scores.tolist() == []
    broken = reward.score([IMAGES[0], Image.new("RGB", (0, 2)), IMAGES[2]], PROMPTS[:3])
    np.testing.assert_allclose(broken.scores, [p[0], np.nan, p[2]], atol=2e-6)
    assert broken.details["reason"] == [None, "the image is empty, 0 x 2 pixels", None]


def test_a_picture_is_padded_to_a_square():
    wide = Image.new("RGB", (4, 1), (255, 0, 0))
    square = np.asarray(pad_to_square(wide, (127, 127, 127)))
    assert square.shape == (4, 4, 3)
    # (4 - 1) // 2 = 1: the second row.
    assert (square[1] == [255, 0, 0]).all() and (square[[0, 2, 3]] == 127).all()
    tall = np.asarray(pad_to_square(Image.new("RGB", (1, 2)), (1, 2, 3)))
    assert (tall[:, 0] == 0).all() and (tall[:, 1] == [1, 2, 3]).all()
    assert pad_to_square(IMAGES[0], (0, 0, 0)) is IMAGES[0]


LLAVA = {
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "multi_modal_projector.linear_1": "model.mm_projector.0",
    "multi_modal_projector.linear_2": "model.mm_projector.2",
    "image_newline": "model.image_newline",
    "language_model.lm_head": "lm_head",
    "language_model.model.": "model.",
}


def llava_files(folder, out):
    """The judge's files under LLaVA-NeXT's names, in two shards."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        start = next(start for start in LLAVA if name.startswith(start))
        tensors[LLAVA[start] + name[len(start) :]] = tensor
    files = {}
    for number in range(2):
        files[f"model-{number}.safetensors"] = dict(list(tensors.items())[number::2])
    out.mkdir()
    for name, shard in files.items():
        save_file(shard, out / name)
    (out / "config.json").write_text(
        json.dumps({**TEXT, "model_type": "llava", "hidden_act": "silu", "mm_vision_tower": "google/siglip-42"})
    )
    (out / "model.safetensors.index.json").write_text("{}")
    write_tokenizer(out)
    return {path.name: path for path in out.iterdir()}


def test_conversion_keeps_every_answer(folder, judge, tmp_path):
    files = llava_files(folder, tmp_path / "llava")
    out = tmp_path / "out"
    out.mkdir()
    convert(files, out)
    _, report = LlavaOnevisionForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    converted = JudgeModel(out, "cpu", "float32")
    assert converted._model.config.text_config.rope_parameters["rope_theta"] == 1e6
    np.testing.assert_array_equal(
        converted.yes_or_no(IMAGES, PROMPTS).gap, judge.yes_or_no(IMAGES, PROMPTS).gap, strict=True
    )


def test_answers_equal_llava_next(tmp_path):
    original = np.load(FIXTURES / "orm_parity.npz")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    shapes = json.loads(str(original["shapes"]))
    save_file({name: weight(name, shape) for name, shape in shapes.items()}, source / "model.safetensors")
    config = {**TEXT, "max_position_embeddings": 2048, "hidden_act": "silu", "mm_vision_tower": "google/siglip-384"}
    (source / "config.json").write_text(json.dumps(config))
    write_tokenizer(source)
    convert({path.name: path for path in source.iterdir()}, out)
    images = [picture(seed, size) for seed, size in ((0, (384, 384)), (1, (60, 42)), (2, (100, 300)))]
    prompts = ["a red cup", "two dogs left of a very long bench", "no"]
    judge = JudgeModel(out, "cpu", "float32")
    answer = judge.yes_or_no(images, prompts)
    np.testing.assert_allclose(answer.gap, original["gap"], atol=2e-6, rtol=0)
    np.testing.assert_allclose(answer.p_either, original["p_either"], atol=1e-6, rtol=0)
    assert np.ptp(original["gap"]) > 0.2
    texts = [
        len(judge._text_tokens(BEFORE_IMAGE)) + len(judge._text_tokens(AFTER_IMAGE.format(prompt=p))) for p in prompts
    ]
    assert [730 + length for length in texts] == original["tokens"].tolist()


def test_foreign_files_are_refused(folder, tmp_path):
    files = llava_files(folder, tmp_path / "llava")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"give config\.json, the \.safetensors files"):
        convert({"config.json": files["config.json"]}, tmp_path / "out")
    save_file({"model.surprise": torch.zeros(1)}, files["model-0.safetensors"])
    with pytest.raises(ValueError, match=r"'model\.surprise' is none of a LLaVA-OneVision"):
        convert(files, tmp_path / "out")
    with pytest.raises(ValueError, match=r"there is no model\.vision_tower.*num_attention_heads"):
        read_config({"hidden_size": 8, "mm_vision_tower": "google/siglip-so400m-patch14-384"}, {})
    with pytest.raises(ValueError, match="the picture's size at the end of mm_vision_tower"):
        read_config({}, {})


def test_the_true_architecture_is_read():
    """Keys and shapes of LLaVA-OneVision 7B, as its published configuration says; on the meta device."""
    vision = "model.vision_tower.vision_tower.vision_model."
    shapes = {
        f"{vision}embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{vision}encoder.layers.0.mlp.fc1.weight": (4304, 1152),
        **{f"{vision}encoder.layers.{layer}.layer_norm1.weight": (1152,) for layer in range(26)},
        "model.mm_projector.0.weight": (3584, 1152),
        "model.image_newline": (3584,),
        "model.embed_tokens.weight": (152064, 3584),
        "lm_head.weight": (152064, 3584),
    }
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
    }
    config = read_config(text, shapes)
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(config)
    assert (config.vision_config.num_attention_heads, config.vision_config.image_size) == (16, 384)
    assert model.model.vision_tower.embeddings.num_patches == 729
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_348_832


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperature_is_checked(temperature):
    with pytest.raises(ValueError, match=r"temperature=.* must be a number above 0"):
        OrmOptions(temperature=temperature)


def test_building_needs_neither_torch_nor_weights():
    code = (
        "import sys; from stage_grpo.rewards.orm import OrmReward; OrmReward();"
        "sys.exit(','.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
