"""T2I-CompBench's two scores that need no detector, against the benchmark's own scripts on the same weights.

``blip_vqa_parity.npz`` and ``clip_similarity_parity.npz`` hold what ``BLIP_vqa.py`` and ``CLIP_similarity.py`` gave
for the images, prompts, vocabulary and weights that `original_blip` makes again; docs/t2i_compbench.md says how.
"""

import gzip
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, BlipForQuestionAnswering, CLIPConfig, CLIPModel

from original_blip import IMAGES, PHRASES, PROMPTS, SIDE, made, vocabulary
from original_janus import weight
from stage_grpo.rewards import noun_phrases
from stage_grpo.rewards.blip_vqa import question
from stage_grpo.rewards.registry import build_reward, lacking
from stage_grpo.weights import MissingWeightsError, cache_folder
from stage_grpo.weights import convert_blip_vqa as converter
from stage_grpo.weights.convert_clip import convert_open_clip, convert_pickled
from test_clip_rewards import save_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
ASKED = [[p for p in PHRASES[prompt] if p not in noun_phrases.NO_THINGS][:8] for prompt in PROMPTS]
METADATA = [{"noun_phrases": phrases} for phrases in ASKED]
FAKE_SPACY = """
from types import SimpleNamespace
from pathlib import Path
import json

def load(name):
    phrases = json.loads((Path(__file__).parent / "phrases.json").read_text())
    return lambda text: SimpleNamespace(noun_chunks=[SimpleNamespace(text=chunk) for chunk in phrases[text]])
"""


@pytest.fixture(scope="module")
def original():
    return np.load(FIXTURES / "blip_vqa_parity.npz")


@pytest.fixture(scope="module")
def state(original):
    return made(json.loads(str(original["shapes"])))


def source_files(folder, content):
    torch.save(content, folder / converter.FILE)
    BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary())}).save_pretrained(folder)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, state):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("blip_vqa")
    converter.convert(source_files(source, {"model": state, "epoch": 1}), out)
    return str(out)


@pytest.fixture(scope="module")
def reward(folder):
    return build_reward("blip_vqa", {"weights": folder, "device": "cpu", "spacy_model": None})


@pytest.fixture
def spacy(tmp_path, monkeypatch):
    """A package called spacy that knows the noun chunks of our prompts, and one model."""
    package = tmp_path / "spacy"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE_SPACY)
    (package / "util.py").write_text("def is_package(name):\n    return name == 'en_core_web_sm'\n")
    (package / "phrases.json").write_text(json.dumps(PHRASES))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    for name in ("spacy", "spacy.util"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    noun_phrases._pipeline.cache_clear()
    yield package
    noun_phrases._pipeline.cache_clear()
    for name in ("spacy", "spacy.util"):
        sys.modules.pop(name, None)


def test_every_answer_equals_the_benchmarks(original, reward):
    model = reward_model(reward)
    asked = [[question(phrase) for phrase in phrases] or ["?"] for phrases in ASKED]
    answers = model.p_yes(IMAGES, asked)
    for place, (phrases, p_yes) in enumerate(zip(ASKED, answers)):
        np.testing.assert_allclose(p_yes[: len(phrases)], original["p_yes"][place, : len(phrases)], atol=1e-6)
    assert np.ptp(original["p_yes"]) > 0.1  # the weights make answers that differ


def reward_model(reward):
    reward.score(IMAGES[:1], PROMPTS[:1], METADATA[:1])
    return reward._model


def test_scores_equal_the_benchmarks_result_file(original, folder, spacy):
    legacy = build_reward("blip_vqa", {"weights": folder, "device": "cpu", "legacy": True})
    np.testing.assert_array_equal(legacy.score(IMAGES, PROMPTS).scores, original["answers"])


def test_scores_are_products_and_no_phrase_is_no_score(original, reward):
    result = reward.score(IMAGES, PROMPTS, METADATA)
    for place in range(4):
        expected = original["p_yes"][place, : len(ASKED[place])].astype(float).prod()
        assert result.scores[place] == pytest.approx(expected, abs=1e-6)
    assert np.isnan(result.scores[4])
    assert result.details["reason"] == [None] * 4 + ["not applicable: the prompt has no noun phrase"]
    assert result.details["noun_phrases"] == ASKED and result.details["p_yes"][4] is None
    assert result.details["p_yes"][0] == [0.8107, 0.7559]


def test_pixels_and_questions_are_the_benchmarks(original, reward):
    processor = reward_model(reward)._processor
    pixels = processor([image.convert("RGB") for image in IMAGES], return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2:] == (SIDE, SIDE)
    np.testing.assert_allclose(pixels[:, :, ::9, ::9].numpy(), original["pixels"], atol=1e-6)
    firsts = [question(phrases[0]) if phrases else "" for phrases in ASKED]
    assert firsts == original["questions"].tolist() == ["a red cat?", "the red hat?", "a dog?", "thing one?", ""]
    assert len(question("word " * 60).split(" ")) == 50


def test_batches_order_and_equal_images_change_nothing(folder, reward):
    together = reward.score(IMAGES[:4], PROMPTS[:4], METADATA[:4]).scores
    single = build_reward("blip_vqa", {"weights": folder, "device": "cpu", "spacy_model": None, "batch_size": 1})
    np.testing.assert_allclose(single.score(IMAGES[:4], PROMPTS[:4], METADATA[:4]).scores, together, atol=1e-6)
    order = [2, 0, 3, 1, 0]
    mixed = reward.score([IMAGES[i].copy() for i in order], PROMPTS[:5], [METADATA[i] for i in order]).scores
    np.testing.assert_allclose(mixed, together[order], atol=1e-6)


def test_equal_images_are_encoded_once(reward):
    model, seen = reward_model(reward), []
    encoder = model._model.vision_model
    hook = encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].shape[0]), with_kwargs=True
    )
    reward.score([IMAGES[0], IMAGES[1], IMAGES[0].copy()], PROMPTS[:3], METADATA[:3])
    hook.remove()
    assert seen == [2]


def test_what_cannot_be_read_is_nan_with_a_reason(reward):
    result = reward.score([IMAGES[0], Image.new("RGB", (3, 0))], PROMPTS[:2], METADATA[:2])
    assert np.isfinite(result.scores[0]) and np.isnan(result.scores[1])
    assert result.details["reason"] == [None, "the image is empty, 3 x 0 pixels"]


def test_phrases_come_from_metadata_before_spacy(spacy):
    name = "en_core_web_sm"
    assert noun_phrases.phrases_of(PROMPTS[1], {"noun_phrases": ["the left", "a hat"]}, name) == ["the left", "a hat"]
    assert noun_phrases.phrases_of(PROMPTS[1], {}, name) == ["The red Hat", "the coat rack"]
    assert noun_phrases.phrases_of(PROMPTS[3], {"tag": "color"}, name) == PHRASES[PROMPTS[3]][:8]
    assert noun_phrases.phrases_of(PROMPTS[4], {"noun_phrases": []}, None) == []


@pytest.mark.parametrize("given", ["a cat", [""], [1], {"a": 1}])
def test_metadata_that_are_no_phrases_are_refused(reward, given):
    with pytest.raises(ValueError, match=r"'a red cat and a blue dog' hold noun_phrases=.*give a list of phrases"):
        reward.score(IMAGES[:1], PROMPTS[:1], [{"noun_phrases": given}])
    with pytest.raises(ValueError, match="hold no 'noun_phrases'; add them, or let spaCy find them"):
        reward.score(IMAGES[:1], PROMPTS[:1])


def test_a_missing_spacy_or_model_is_named_with_both_ways_out(spacy, monkeypatch):
    assert build_reward("blip_vqa").check_health() == "blip_vqa"
    assert build_reward("blip_vqa", {"spacy_model": None}).check_health() == "blip_vqa"
    assert build_reward("blip_vqa", {"spacy_model": str(spacy)}).check_health() == "blip_vqa"  # a folder is a pipeline
    other = build_reward("blip_vqa", {"spacy_model": "de_core"})
    with pytest.raises(ValueError, match=r"'de_core' is not installed; python -m spacy download de_core \(or put "):
        other.score(IMAGES[:1], PROMPTS[:1])
    monkeypatch.setattr(noun_phrases.importlib.util, "find_spec", lambda name: None)
    (what, remedy), *_ = lacking("blip_vqa")
    assert what == "noun phrases need spaCy, which is not installed"
    assert remedy.startswith("pip install 'stage-grpo[t2i_compbench]' (or put 'noun_phrases' into the metadata")


def test_an_empty_spacy_model_is_refused():
    with pytest.raises(ValueError, match=r"'blip_vqa' rejects its options.*spacy_model='' is no text"):
        build_reward("blip_vqa", {"spacy_model": ""})


def test_building_loads_nothing_and_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("STAGE_WEIGHTS", str(tmp_path))
    with pytest.raises(MissingWeightsError, match="stage weights get blip-vqa"):
        build_reward("blip_vqa", {"spacy_model": None}).score(IMAGES[:1], PROMPTS[:1], METADATA[:1])


def test_every_tensor_of_the_true_model_has_its_place(tmp_path, monkeypatch):
    """Names and shapes from the benchmark's own class at its own sizes."""
    shapes = json.loads(gzip.decompress((FIXTURES / "blip_vqa_names.json.gz").read_bytes()))
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    models = []
    monkeypatch.setattr(BlipForQuestionAnswering, "save_pretrained", lambda model, folder: models.append(model))
    monkeypatch.setattr(converter, "read_tensors", lambda file: {"model": state})
    converter.convert({converter.FILE: tmp_path / converter.FILE}, tmp_path)

    (model,) = models
    assert sum(p.numel() for p in model.parameters()) == 361_478_972  # as torch counts the original's
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.image_size, vision.patch_size, vision.num_hidden_layers, vision.layer_norm_eps) == (
        480,
        16,
        12,
        1e-6,
    )
    assert (text.vocab_size, text.bos_token_id, text.num_attention_heads, text.layer_norm_eps) == (
        30524,
        30522,
        12,
        1e-12,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual_encoder.blocks.1.norm1.bias": None}, r"BlipForQuestionAnswering.*layers\.1\.layer_norm1\.bias"),
        ({"text_decoder.surprise": torch.zeros(1)}, r"BlipForQuestionAnswering.*text_decoder\.surprise"),
        ({"visual_encoder.pos_embed": None}, "lacks 'pos_embed'"),
        (
            {"text_decoder.cls.predictions.bias": None, "text_decoder.cls.predictions.decoder.bias": None},
            "lacks 'text_",
        ),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(change, message, state, tmp_path):
    changed = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=f"(?s){converter.FILE}.*{message}"):
        converter.convert(source_files(tmp_path, {"model": changed}), tmp_path)
    with pytest.raises(ValueError, match="has no 'model'; it is no checkpoint of BLIP"):
        converter.convert(source_files(tmp_path, {"weights": {}}), tmp_path)


@pytest.fixture(scope="module")
def similarity():
    return np.load(FIXTURES / "clip_similarity_parity.npz")


def test_clip_equals_clip_similarity(similarity, tmp_path):
    """``CLIP_similarity.py`` with the CLIP that T2I-CompBench brings along, from PNG to the number it writes."""
    shapes = json.loads(str(similarity["shapes"]))
    state = {name: weight(name, shape) for name, shape in shapes.items() if shape}
    for name, tensor in state.items():
        if name.endswith("weight") and name.split(".")[-2].startswith("ln_"):
            tensor += 1
    convert_open_clip(state | {"logit_scale": torch.tensor(math.log(100.0))}, tmp_path, 2, 4, "quick_gelu", "test")
    save_tokenizer(tmp_path)
    reward = build_reward("clip", {"weights": str(tmp_path), "device": "cpu"})
    scores = reward.score(IMAGES, similarity["prompts"].tolist()).scores
    np.testing.assert_allclose(scores, similarity["answers"], atol=1e-6)


def test_a_reward_takes_other_weights_of_the_cache_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("STAGE_WEIGHTS", str(tmp_path / "cache"))
    reward = build_reward("clip", {"weights": "clip-vit-base-patch32"})
    assert reward.needed_weights() == ("clip-vit-base-patch32",)
    with pytest.raises(MissingWeightsError, match="stage weights get clip-vit-base-patch32"):
        reward.score(IMAGES[:1], PROMPTS[:1])
    assert build_reward("clip").needed_weights() == ("clip-vit-large-patch14",)
    assert lacking("clip", {"weights": "clip-vit-base-patch32"}) == [
        (
            f"the weights clip-vit-base-patch32 of reward clip are not in {cache_folder()}",
            "stage weights get clip-vit-base-patch32",
        )
    ]


def test_pickled_weights_of_the_hub_become_safetensors(tmp_path):
    shared = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"vocab_size": 20, "bos_token_id": 18, "eos_token_id": 19, "max_position_embeddings": 7}
    config = CLIPConfig(text_config={**shared, **ends}, vision_config={**shared, "image_size": 16, "patch_size": 8})
    model = CLIPModel(config)
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir(), out.mkdir()
    config.save_pretrained(source)
    (source / "merges.txt").write_text("#version: 0.2\n")
    counter = {"text_model.embeddings.position_ids": torch.arange(7)[None]}
    torch.save({**model.state_dict(), **counter}, source / "pytorch_model.bin")
    convert_pickled({path.name: path for path in source.iterdir()}, out)

    assert {path.name for path in out.iterdir()} == {"config.json", "merges.txt", "model.safetensors"}
    again = CLIPModel.from_pretrained(out).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    torch.save({"logit_scale": torch.tensor(0.0)}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"(?s)pytorch_model\.bin does not fill a CLIPModel"):
        convert_pickled({path.name: path for path in source.iterdir()}, out)
