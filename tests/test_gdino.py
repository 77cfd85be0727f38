"""GroundingDINO and its reward, against IDEA's own network."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GroundingDinoForObjectDetection

from original_gdino import CASES, FIXTURES, names, picture, tensors, write_converted
from stage_grpo.rewards.gdino import GdinoOptions, GdinoReward
from stage_grpo.rewards.gdino_model import PhraseDetector
from stage_grpo.rewards.grounding_rules import build_caption, judge
from stage_grpo.rewards.t2i_r1_rows import parse_row
from stage_grpo.weights.convert_gdino import convert, read_config, rename


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_converted(tmp_path_factory.mktemp("gdino"))


@pytest.fixture(scope="module")
def detector(folder):
    return PhraseDetector(folder, "cpu")


@pytest.fixture(scope="module")
def original():
    return np.load(FIXTURES / "gdino_parity.npz")


def test_token_logits_and_boxes_equal_ideas(detector, original):
    for case, (seed, size, nouns) in enumerate(CASES):
        caption = build_caption(nouns)
        pixels = detector._processor([picture(seed, size)], return_tensors="pt")
        text = detector._tokenizer([caption.text], return_tensors="pt")
        with torch.inference_mode():
            output = detector._model(**pixels, **text)
        num_tokens = text.input_ids.shape[1]
        assert torch.isneginf(output.logits[0, :, num_tokens:]).all()
        logits = output.logits[0, :, :num_tokens].numpy()
        # Both run the same float32 operations in another order: 3e-6 at most where measured, of logits from -4 to 1.
        np.testing.assert_allclose(logits, original[f"logits_{case}"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(output.pred_boxes[0].numpy(), original[f"boxes_{case}"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("legacy", [False, True])
def test_phrase_scores_equal_ideas(detector, original, legacy):
    for case, (seed, size, nouns) in enumerate(CASES):
        (scores,), boxes = detector.phrase_scores([picture(seed, size)], [build_caption(nouns, legacy)])
        expected = original[f"{'legacy' if legacy else 'whole'}_{case}"]
        np.testing.assert_allclose(scores.numpy(), expected, atol=2e-6, rtol=0)
        np.testing.assert_allclose(boxes[0].numpy(), original[f"boxes_{case}"], atol=2e-6, rtol=0)


def test_a_batch_scores_like_its_pictures_alone(detector):
    images = [picture(seed, (60, 60)) for seed in range(3)] + [picture(3, (40, 80))]
    captions = [build_caption(nouns) for nouns in (["red apple", "cup"], ["dog"], ["stop sign", "tv", "bus"], ["cup"])]
    together = detector.detect(images, captions, 0.2, batch_size=3)
    alone = [detector.detect([i], [c], 0.2, batch_size=1)[0] for i, c in zip(images, captions)]
    assert sum(len(boxes) for found in together for boxes in found.values()) > 50
    for batched, single in zip(together, alone):
        assert {phrase: len(boxes) for phrase, boxes in batched.items()} == {p: len(b) for p, b in single.items()}
        for phrase, boxes in batched.items():
            np.testing.assert_allclose(np.array(boxes), np.array(single[phrase]).reshape(-1, 5), atol=1e-5, rtol=0)


def test_a_phrase_scores_the_mean_of_its_tokens(detector, original):
    tokens = 1 / (1 + np.exp(-original["logits_0"].astype(np.float64)))  # [CLS] red apple . cup . [SEP]
    (scores,), _ = detector.phrase_scores([picture(0, (60, 60))], [build_caption(["red apple", "cup"])])
    expected = [(tokens[:, 1] + tokens[:, 2]) / (2 + 1e-6), tokens[:, 4] / (1 + 1e-6)]
    np.testing.assert_allclose(scores.numpy(), expected, atol=2e-6)


def test_boxes_are_corners_above_the_threshold(detector):
    image, caption = picture(1, (60, 60)), build_caption(["stop sign"])
    (scores,), boxes = detector.phrase_scores([image], [caption])
    (found,) = detector.detect([image], [caption], 0.3, 1)
    expected = [
        (x - w / 2, y - h / 2, x + w / 2, y + h / 2, score)
        for (x, y, w, h), score in zip(boxes[0].tolist(), scores[0].tolist())
        if score > 0.3
    ]
    assert 0 < len(expected) < 30
    np.testing.assert_allclose(np.array(found["stop sign"]), np.array(expected), atol=1e-6)


@pytest.fixture(scope="module")
def reward(folder):
    return GdinoReward(GdinoOptions(weights=str(folder), device="cpu", box_threshold=0.3))


ROWS = [
    {"task_type": "object", "nouns": ["red apple", "cup"]},
    {"task_type": "numeracy", "nouns": ["dog"], "numeracy_info": [{"obj_name": "dog", "num": 3}]},
    {
        "task_type": "spatial",
        "nouns": ["cup", "dog"],
        "spatial_info": {"obj1": "cup", "obj2": "dog", "locality": "above"},
    },
    {"task_type": "non", "nouns": []},
    {
        "task_type": "spatial",
        "nouns": ["cup"],
        "spatial_info": {"obj1": "cup", "obj2": "cup", "locality": "near"},
    },
]


def test_the_reward_judges_what_the_detector_finds(reward, detector):
    images = [picture(seed, (60, 60)) for seed in range(5)]
    result = reward.score(images, [""] * 5, ROWS)
    captions = [build_caption(row["nouns"]) for row in ROWS[:3]]
    found = detector.detect(images[:3], captions, 0.3, 3)
    expected = [judge(parse_row(row), boxes) for row, boxes in zip(ROWS, found)]
    np.testing.assert_allclose(result.scores, [*expected, np.nan, np.nan], atol=1e-6)
    assert result.details["reason"] == [
        None,
        None,
        None,
        "not applicable: the row names no object",
        "not applicable: the row relates two objects that are both called 'cup'",
    ]
    assert result.details["found"][1] == f"{len(found[1]['dog'])} dog"
    assert result.details["task_type"] == ["object", "numeracy", "spatial", "non", "spatial"]
    images[2] = Image.new("RGB", (0, 3))
    result = reward.score(images, [""] * 5, ROWS)
    np.testing.assert_allclose(result.scores, [*expected[:2], np.nan, np.nan, np.nan], atol=1e-6)
    assert result.details["reason"][2] == "the image is empty, 0 x 3 pixels"


def test_legacy_scores_rows_that_cannot_be_scored(folder):
    reward = GdinoReward(GdinoOptions(weights=str(folder), device="cpu", legacy=True))
    result = reward.score([picture(0, (60, 60))] * 2, ["", ""], ROWS[3:])
    assert result.scores.tolist() == [1.0, 0.0]
    assert result.details["reason"] == [None, None]


def test_the_true_network_is_accounted_for():
    shapes = names("true")
    with torch.device("meta"):
        original = {name: torch.empty(shape) for name, shape in shapes.items()}
        model = GroundingDinoForObjectDetection(read_config(original))
    # transformers makes one norm of 2 x 768 numbers that is never used.
    assert sum(parameter.numel() for parameter in model.parameters()) == 172_249_090 + 2 * 768
    renamed = rename(original)
    assert sum(tensor.numel() for tensor in renamed.values()) == 172_249_090
    # The small network has the same names, and loads without one missing or left over.
    small, true = ({re.sub(r"\d+", "N", name) for name in made} for made in (rename(tensors()), renamed))
    assert small == true
    assert (model.config.d_model, model.config.num_queries, model.config.encoder_layers) == (256, 900, 6)
    assert model.config.backbone_config.depths == [2, 2, 6, 2]
    assert model.config.text_config.num_attention_heads == 12


def test_foreign_files_are_refused(tmp_path):
    good = tensors()
    for change, message in (
        ({"surprise.weight": torch.zeros(2)}, "'surprise.weight' is not one of GroundingDINO's"),
        ({"transformer.tgt_embed.weight": None}, "no tensor 'transformer.tgt_embed.weight'"),
        ({"feat_map.bias": None}, "does not fit GroundingDINO: .*text_projection.bias"),
    ):
        state = {name: value for name, value in (good | change).items() if value is not None}
        torch.save({"model": state}, tmp_path / "g.pth")
        with pytest.raises(ValueError, match=message):
            convert({"g.pth": tmp_path / "g.pth"}, tmp_path)
    (tmp_path / "torn.pth").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"torn\.pth holds more than tensors, or is broken: .*; get it again"):
        convert({"torn.pth": tmp_path / "torn.pth"}, tmp_path)
    with pytest.raises(ValueError, match=r"found 0 \.pth files"):
        convert({}, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box_threshold": 0}, "box_threshold=0 must be a number between 0 and 1"),
        ({"near_distance": 2.5}, "near_distance=2.5 must be a number between 0 and 2"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' does not work"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        GdinoOptions(**options)


def test_building_needs_neither_torch_nor_weights():
    code = (
        "import sys; from stage_grpo.rewards.gdino import GdinoReward; GdinoReward();"
        "sys.exit(','.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
