"""HPS, CLIP score, PickScore and the aesthetic predictor, against what the originals compute on the same weights.

``clip_parity.npz`` holds what hpsv2 1.2.0 (``hpsv2.score``), open_clip 3.3.0 and Flow-GRPO's scorers gave for the
images, prompts, vocabulary and weights that this file makes again; docs/rewards.md says how they were run.
"""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from original_janus import weight
from stage_grpo.rewards.base import as_trl_reward
from stage_grpo.rewards.clip_pixels import MEAN, STD, crop_pixels, crop_pixels_rounding_down, pad_pixels
from stage_grpo.rewards.clip_rewards import AestheticReward, ClipReward, HpsReward, PickscoreReward, clean_text
from stage_grpo.rewards.loading import load_head
from stage_grpo.weights import MissingWeightsError
from stage_grpo.weights.convert_aesthetic import convert as convert_aesthetic
from stage_grpo.weights.convert_clip import convert_hps, convert_open_clip

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = [(60, 60), (42, 42), (64, 40), (37, 71), (52, 45), (42, 30)]
IMAGES = [
    Image.fromarray(np.random.RandomState(i).randint(0, 256, (height, width, 3)).astype(np.uint8))
    for i, (width, height) in enumerate(SIZES)
]
LONG = "the " * 40 + "end of that"
PROMPTS = [
    "a red cube",
    "a photo of two cats\u2019 “ears” &amp; tails",
    "  Mixed   CASE\nwords 123 é",
    LONG,
    "",
    "a red cube",
]
CLIP_PROMPTS = ["a red cube", "two cats and that", "MIXED words 12", LONG, "", "a red cube"]
MERGES = ["t h", "th e</w>", "a t</w>", "o f</w>", "a t", "th at</w>", "c at"]


@pytest.fixture(scope="module")
def original():
    return np.load(FIXTURES / "clip_parity.npz")


@pytest.fixture(scope="module")
def shapes(original):
    return json.loads(str(original["shapes"]))


def clip_weights(shapes):
    """Tensors under open_clip's names, the same as the originals were given."""
    made = {name: weight(name, shape) for name, shape in shapes.items() if name != "logit_scale"}
    for name, tensor in made.items():
        if name.endswith("weight") and name.split(".")[-2].startswith("ln_"):
            tensor += 1
    return made | {"logit_scale": torch.tensor(math.log(100.0))}


def save_tokenizer(folder):
    """A byte-pair tokenizer in CLIP's order: bytes, bytes that end a word, merges, start, end."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    assert set(letters) == set(ByteLevel.alphabet())
    pieces = letters + [f"{letter}</w>" for letter in letters] + [merge.replace(" ", "") for merge in MERGES]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    CLIPTokenizer(vocab=vocab, merges=[tuple(merge.split()) for merge in MERGES]).save_pretrained(folder)


@pytest.fixture(scope="module")
def hps_folder(tmp_path_factory, shapes):
    """HPS's small twin, converted from a file like the official one."""
    source, out = tmp_path_factory.mktemp("hps_source"), tmp_path_factory.mktemp("hps")
    torch.save({"state_dict": clip_weights(shapes)}, source / "hps.pt")
    save_tokenizer(source)
    others = {path.name: path for path in source.glob("*.json")}
    convert_hps({"HPS_v2.1_compressed.pt": source / "hps.pt", **others}, out)
    return str(out)


def clip_folder(folder, shapes, act):
    convert_open_clip(clip_weights(shapes), folder, 16, 16, act, "test")
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def openai_folder(tmp_path_factory, shapes):
    return clip_folder(tmp_path_factory.mktemp("clip"), shapes, "quick_gelu")


@pytest.fixture(scope="module")
def hps(hps_folder):
    return HpsReward(HpsReward.Options(weights=hps_folder, device="cpu"))


def scores(reward, images=IMAGES, prompts=PROMPTS):
    return reward.score(images, prompts).scores


def test_hps_equals_hpsv2_from_file_to_score(original, hps):
    # The last image is the one that the original cannot score: NaN in the fixture.
    np.testing.assert_allclose(scores(hps)[:5], original["hps_scores"][:5], atol=1e-6)
    assert np.isnan(original["hps_scores"][5]) and np.isfinite(scores(hps)[5])


def test_hps_pixels_equal_torchvisions(original):
    for i in (0, 2, 3):
        np.testing.assert_allclose(pad_pixels(IMAGES[i], 42).numpy(), original[f"hps_pixels_{i}"], atol=1e-6)


def test_hps_pads_what_the_original_forgets_to_pad():
    # 42 x 30: 6 rows of black above and below, nothing is resized.
    pixels = pad_pixels(IMAGES[5], 42)
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    torch.testing.assert_close(pixels[:, 0, 0], black, atol=1e-6, rtol=0)
    torch.testing.assert_close(pixels[:, 36:], pixels[:, :6], atol=1e-6, rtol=0)
    red = (IMAGES[5].getpixel((7, 0))[0] / 255 - 0.48145466) / 0.26862954
    assert pixels[0, 6, 7].item() == pytest.approx(red, abs=1e-6)


def test_prompts_become_the_same_tokens(original, hps):
    ids = hps.encoder.tokenizer([clean_text(p) for p in PROMPTS], truncation=True, max_length=77).input_ids
    for row, wanted in zip(ids, original["hps_ids"]):
        assert row == wanted[: len(row)].tolist() and not wanted[len(row) :].any()


def test_text_is_cleaned_as_open_clip_does():
    assert clean_text(" “two” cats\u2019 &amp;amp; &lt;b&gt; &rsquo; ") == "\"two\" cats' & <b> '"


def test_clip_score_equals_open_clip(original, openai_folder):
    cosine = ClipReward(ClipReward.Options(weights=openai_folder, device="cpu"))
    np.testing.assert_allclose(scores(cosine, prompts=CLIP_PROMPTS), original["clip_scores"], atol=1e-6)
    np.testing.assert_allclose(crop_pixels(IMAGES[4], 42).numpy(), original["clip_pixels_4"], atol=1e-6)
    hundred = ClipReward(ClipReward.Options(weights=openai_folder, device="cpu", hundred=True))
    wanted = [100 * max(score, 0.0) for score in scores(cosine, prompts=CLIP_PROMPTS)]
    np.testing.assert_allclose(scores(hundred, prompts=CLIP_PROMPTS), wanted, atol=1e-5)
    assert min(wanted) == 0.0 < max(wanted)


def test_pickscore_equals_flow_grpos(original, hps_folder):
    options = PickscoreReward.Options(weights=hps_folder, device="cpu", scale=1 / 26)
    np.testing.assert_allclose(scores(PickscoreReward(options)), original["pickscore_scores"], atol=1e-5)
    raw = scores(PickscoreReward(PickscoreReward.Options(weights=hps_folder, device="cpu")))
    np.testing.assert_allclose(raw / 26, original["pickscore_scores"], atol=1e-5)


@pytest.fixture(scope="module")
def aesthetic_weights():
    widths = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    named = {}
    for place, (inputs, outputs) in widths.items():
        for kind, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            named[f"layers.{place}.{kind}"] = weight(f"aesthetic.layers.{place}.{kind}", shape)
    return named


def test_aesthetic_equals_flow_grpos(original, shapes, aesthetic_weights, tmp_path):
    wide = shapes | {"visual.proj": [64, 768], "text_projection": [64, 768]}
    source, head, clip = (tmp_path / name for name in ("sac+logos+ava1-l14-linearMSE.pth", "head", "clip"))
    head.mkdir(), clip.mkdir()
    torch.save(aesthetic_weights, source)
    convert_aesthetic({source.name: source}, head)
    options = {"weights": str(head), "clip_weights": clip_folder(clip, wide, "quick_gelu"), "device": "cpu"}
    reward = AestheticReward(AestheticReward.Options(**options))
    np.testing.assert_allclose(scores(reward), original["aesthetic_scores"], atol=1e-6)
    np.testing.assert_array_equal(scores(reward), scores(reward, prompts=["another"] * 6))


def test_a_head_without_activations_by_hand(tmp_path):
    # 2 (x + 2y + 1) - 3 (3x) + 0.5 at (1, 2): 2 * 6 - 9 + 0.5
    tensors = {
        "0.weight": [[1.0, 2.0], [3.0, 0.0]],
        "0.bias": [1.0, 0.0],
        "10.weight": [[2.0, -3.0]],
        "10.bias": [0.5],
    }
    save_file({f"layers.{name}": torch.tensor(values) for name, values in tensors.items()}, tmp_path / "head")
    assert load_head(tmp_path / "head", 2, "cpu")(torch.tensor([[1.0, 2.0]])).item() == 3.5
    with pytest.raises(ValueError, match="from 3 features to one score"):
        load_head(tmp_path / "head", 3, "cpu")


def test_crops_of_oblong_images_differ_between_the_two_originals():
    # 45 x 42 at side 42: a spare of 3, half of it 1.5, which rounds to 2 and down to 1.
    image = Image.fromarray(np.arange(45, dtype=np.uint8)[None, :, None].repeat(42, 0).repeat(3, 2))
    red = [(x / 255 - 0.48145466) / 0.26862954 for x in (2, 1)]
    assert crop_pixels(image, 42)[0, 0, 0].item() == pytest.approx(red[0], abs=1e-6)
    assert crop_pixels_rounding_down(image, 42)[0, 0, 0].item() == pytest.approx(red[1], abs=1e-6)
    same = image.crop((0, 0, 44, 42))  # a spare of 2 is not ambiguous
    torch.testing.assert_close(crop_pixels(same, 42), crop_pixels_rounding_down(same, 42), atol=0, rtol=0)


def test_pixels_equal_transformers_own(hps):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})
    for image in IMAGES:
        wanted = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
        torch.testing.assert_close(crop_pixels_rounding_down(image, 42), wanted, atol=1e-6, rtol=0)


def test_batches_prompt_order_and_repeats_change_nothing(hps_folder, hps):
    single = HpsReward(HpsReward.Options(weights=hps_folder, device="cpu", batch_size=1))
    np.testing.assert_allclose(scores(single), scores(hps), atol=1e-6)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = scores(hps, [IMAGES[i] for i in order], [PROMPTS[i] for i in order])
    np.testing.assert_allclose(shuffled, scores(hps)[order], atol=1e-6)


def test_every_different_prompt_is_encoded_once(hps, monkeypatch):
    counts = {"texts": 0, "images": 0}
    text, image = hps.encoder.model.get_text_features, hps.encoder.model.get_image_features

    def count_texts(input_ids):
        counts["texts"] += len(input_ids)
        return text(input_ids=input_ids)

    def count_images(pixel_values):
        counts["images"] += len(pixel_values)
        return image(pixel_values=pixel_values)

    monkeypatch.setattr(hps.encoder.model, "get_text_features", count_texts)
    monkeypatch.setattr(hps.encoder.model, "get_image_features", count_images)
    scores(hps, IMAGES * 2, PROMPTS * 2)
    assert counts == {"texts": 5, "images": 12}


def test_what_cannot_be_scored_is_nan_with_a_reason(hps, tmp_path):
    IMAGES[0].save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    broken = [IMAGES[0], Image.open(tmp_path / "cut.png"), Image.new("RGB", (0, 4)), IMAGES[1].convert("RGBA")]
    result = hps.score(broken, ["a red cube"] * 4)
    np.testing.assert_array_equal(np.isnan(result.scores), [False, True, True, False])
    wanted = scores(hps, IMAGES[:2], ["a red cube"] * 2)
    np.testing.assert_allclose(result.scores[[0, 3]], wanted, atol=1e-6)
    assert result.details["reason"][1].startswith("the image cannot be read")
    assert result.details["reason"][2] == "the image is empty, 0 x 4 pixels"
    assert result.details["reason"][0] is result.details["reason"][3] is None
    assert np.isnan(hps.score(broken[2:3], ["a red cube"]).scores).all()


def test_a_score_that_is_not_finite_is_nan(hps_folder):
    reward = HpsReward(HpsReward.Options(weights=hps_folder, device="cpu"))
    reward.encoder.model.visual_projection.weight[0, 0] = float("inf")
    result = reward.score(IMAGES[:2], PROMPTS[:2])
    assert np.isnan(result.scores).all() and "use dtype float32" in result.details["reason"][0]


def test_trl_gets_scores_and_none(hps):
    given = as_trl_reward(hps)(prompts=PROMPTS[:2], generated_images=[IMAGES[0], Image.new("RGB", (4, 0))])
    assert given == [pytest.approx(scores(hps)[0], abs=1e-6), None]


def test_scoring_leaves_no_trace(hps_folder):
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    reward = HpsReward(HpsReward.Options(weights=hps_folder, device="cpu"))
    scores(reward)
    assert torch.equal(torch.rand(2), wanted) and torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert not reward.encoder.model.training
    assert not any(parameter.requires_grad for parameter in reward.encoder.model.parameters())


def test_zero3_does_not_split_the_model(hps_folder, hps):
    from transformers.integrations import deepspeed

    class Config:
        def is_zero3(self):
            return True

    config = Config()
    deepspeed.set_hf_deepspeed_config(config)
    try:
        reward = HpsReward(HpsReward.Options(weights=hps_folder, device="cpu"))
        np.testing.assert_allclose(scores(reward), scores(hps), atol=1e-6)
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_half_precision_is_close(hps_folder, hps):
    half = HpsReward(HpsReward.Options(weights=hps_folder, device="cpu", dtype="bfloat16"))
    assert half.encoder.model.dtype == torch.bfloat16
    # Two layers in steps of 2^-8: within 0.02 of cosines that spread over 0.4.
    np.testing.assert_allclose(scores(half), scores(hps), atol=2e-2)


def test_weights_that_are_not_whole_are_refused(hps_folder, tmp_path):
    for file in Path(hps_folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reward = HpsReward(HpsReward.Options(weights=str(tmp_path), device="cpu"))
    with pytest.raises(ValueError, match=r"lacks 1 weights of CLIPModel, such as visual_projection\.weight"):
        scores(reward)


@pytest.mark.parametrize("reward_class", [HpsReward, ClipReward, PickscoreReward, AestheticReward])
def test_building_loads_nothing_and_missing_weights_are_named(reward_class, monkeypatch, tmp_path):
    monkeypatch.setenv("STAGE_WEIGHTS", str(tmp_path))
    reward = reward_class()
    with pytest.raises(MissingWeightsError, match=f"stage weights get {reward.requirements[-1]}"):
        reward.score(IMAGES[:1], PROMPTS[:1])


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        (PickscoreReward.Options, {"scale": 0}, "scale=0 must be a number above 0"),
        (PickscoreReward.Options, {"scale": float("nan")}, "scale=nan must be"),
        (PickscoreReward.Options, {"dtype": "int8"}, "dtype='int8'"),
        (AestheticReward.Options, {"clip_weights": ""}, "clip_weights='' is no text"),
        (AestheticReward.Options, {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_options_are_checked(options, values, message):
    with pytest.raises(ValueError, match=message):
        options(**values)


def test_every_tensor_of_the_true_hps_has_its_place(tmp_path, monkeypatch):
    """Names and shapes of ViT-H/14, from hpsv2 1.2.0 and open_clip 3.3.0, which agree; no memory is taken."""
    shapes = json.loads(gzip.decompress((FIXTURES / "clip_vit_h_14.json.gz").read_bytes()))
    assert sum(math.prod(shape) for shape in shapes.values()) == 986_109_441
    saved = {}
    monkeypatch.setattr(CLIPModel, "save_pretrained", lambda model, folder: saved.update(model=model))
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    convert_open_clip(state, tmp_path, 16, 16, "gelu", "test")
    config: CLIPConfig = saved["model"].config
    assert sum(parameter.numel() for parameter in saved["model"].parameters()) == 986_109_441
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers) == (224, 14, 1280, 32)
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size, text.eos_token_id) == (1024, 24, 49408, 49407)
    assert (config.projection_dim, vision.intermediate_size, text.intermediate_size) == (1024, 5120, 4096)


class Payload:
    """What an attack would hide in a checkpoint."""

    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": Payload()}, "holds more than tensors, or is broken"),
        ([1, 2], "holds a list, not tensors by name"),
        ({"weights": {}}, "has no 'state_dict'"),
        ({"state_dict": {"visual.trunk.weight": torch.zeros(1)}}, "'visual.trunk.weight', which is no part"),
        ({"state_dict": {"logit_scale": torch.zeros(())}}, "is no CLIP with vision transformer"),
    ],
)
def test_files_that_are_no_hps_are_refused(content, message, tmp_path, capsys):
    file = tmp_path / "hps.pt"
    torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        convert_hps({"HPS_v2.1_compressed.pt": file}, tmp_path)
    assert "run" not in capsys.readouterr().out


def test_a_tensor_too_few_or_a_file_missing_is_named(shapes, tmp_path):
    state = clip_weights(shapes)
    del state["visual.ln_post.bias"]
    with pytest.raises(ValueError, match=r"(?s)test does not fill a CLIPModel.*post_layernorm\.bias"):
        convert_open_clip(state, tmp_path, 16, 16, "gelu", "test")
    with pytest.raises(ValueError, match=r"HPS_v2.1_compressed\.pt is missing among vocab\.json"):
        convert_hps({"vocab.json": tmp_path / "vocab.json"}, tmp_path)
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="is broken"):
        convert_aesthetic({"sac+logos+ava1-l14-linearMSE.pth": tmp_path / "cut.pth"}, tmp_path)


def test_a_predictor_that_is_no_chain_of_layers_is_refused(aesthetic_weights, tmp_path):
    file = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    for wrong in (
        {"fc.weight": torch.zeros(1)},
        {},
        {k: v for k, v in aesthetic_weights.items() if "7.bias" not in k},
    ):
        torch.save(wrong, file)
        with pytest.raises(ValueError, match="no linear layers"):
            convert_aesthetic({file.name: file}, tmp_path)
