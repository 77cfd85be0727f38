"""The GIT reward, against transformers' own forward and generate, one question at a time."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, GitConfig, GitForCausalLM

from original_gdino import picture, write_tokenizer
from stage_grpo.rewards.git import GitOptions, GitReward, questions
from stage_grpo.rewards.git_model import YesNoModel
from stage_grpo.rewards.readable import drop_infinite
from stage_grpo.rewards.t2i_r1_rows import parse_row

ROWS = [
    {"task_type": "color", "nouns": ["cup", "apple"], "attr_nouns": ["red cup", "a left apple tv"]},
    {"task_type": "non", "nouns": ["dog"]},
    {"task_type": "complex", "nouns": ["bus", "zebra"], "attr_nouns": None},
    {"task_type": "shape", "nouns": ["cup"], "attr_nouns": ["stop sign", "bench", "red dog"]},
    {"task_type": "object", "nouns": ["ice cream cone", "cup"]},
]
IMAGES = [picture(seed, size) for seed, size in enumerate([(40, 40), (40, 60), (28, 28), (50, 30), (40, 40)])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("git")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = GitForCausalLM(GitConfig(vision_config=vision, vocab_size=1100, **text))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def reward(folder, **options):
    return GitReward(GitOptions(weights=str(folder), device="cpu", **options))


@pytest.fixture(scope="module")
def model(folder):
    return YesNoModel(folder, "cpu", "float32")


def by_hand(model, image, question, generate):
    """Probability of yes against no, of one question about one picture, as the published reward asks it."""
    tokenizer, git = model._tokenizer, model._model
    pixels = model._processor(image, return_tensors="pt").pixel_values
    ids = torch.tensor([[tokenizer.cls_token_id, *tokenizer(question, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        if generate:
            made = git.generate(
                pixel_values=pixels,
                input_ids=ids,
                max_new_tokens=1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            logits = made.logits[0]
        else:
            logits = git(pixel_values=pixels, input_ids=ids).logits[:, -1]
    yes, no = logits.double().softmax(-1)[0, tokenizer.convert_tokens_to_ids(["yes", "no"])]
    return float(yes / (yes + no))


@pytest.mark.parametrize("generate", [False, True])
def test_batched_questions_equal_questions_one_by_one(folder, model, generate):
    result = reward(folder, batch_size=2).score(IMAGES, [""] * 5, ROWS)
    expected = [
        [by_hand(model, image, question, generate) for question in questions(parse_row(row))]
        for image, row in zip(IMAGES, ROWS)
    ]
    assert np.ptp([p for row in expected for p in row]) > 0.3  # the questions are told apart
    np.testing.assert_allclose(result.scores, [np.mean(row) for row in expected], atol=1e-6)
    for shown, row in zip(result.details["p_yes"], expected):
        np.testing.assert_allclose(shown, row, atol=6e-5)  # rounded for the log


def test_questions_of_a_row():
    assert questions(parse_row(ROWS[0])) == ["red cup?", "a left apple tv?"]
    assert questions(parse_row(ROWS[2])) == ["bus?", "zebra?"]


def test_each_picture_is_encoded_once(model):
    seen = []
    hook = model._model.git.image_encoder.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    answers = model.p_yes(IMAGES[:3], [["red cup?", "dog?", "bus?"], ["cup?"], ["a?", "stop sign?"]])
    hook.remove()
    assert seen == [3]
    assert [len(p_yes) for p_yes in answers] == [3, 1, 2]


def test_batch_size_changes_nothing(folder):
    scores = [reward(folder, batch_size=size).score(IMAGES, [""] * 5, ROWS).scores for size in (1, 2, 5)]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-6)
    np.testing.assert_allclose(scores[2], scores[0], atol=1e-6)


def test_rows_that_it_has_nothing_to_say_about(folder):
    rows = [
        {
            "task_type": "spatial",
            "nouns": ["cup", "dog"],
            "spatial_info": {"obj1": "cup", "obj2": "dog", "locality": "near"},
        },
        {"task_type": "numeracy", "nouns": ["cup"], "numeracy_info": [{"obj_name": "cup", "num": 2}]},
        {"task_type": "non", "nouns": []},
    ]
    result = reward(folder).score(IMAGES[:3], [""] * 3, rows)
    assert np.isnan(result.scores).all()
    assert result.details["reason"] == [
        "not applicable: it does not score spatial rows",
        "not applicable: it does not score numeracy rows",
        "not applicable: the row names no object",
    ]
    published = reward(folder, legacy=True).score(IMAGES[:3], [""] * 3, rows)
    assert published.scores.tolist() == [0.0, 0.0, 1.0]
    assert published.details["reason"] == [None] * 3


def test_legacy_scores_other_rows_alike(folder):
    published = reward(folder, legacy=True).score(IMAGES, [""] * 5, ROWS)
    np.testing.assert_allclose(published.scores, reward(folder).score(IMAGES, [""] * 5, ROWS).scores, atol=1e-6)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_broken_picture_costs_nothing_but_its_own_score(folder, legacy):
    images = [IMAGES[0], Image.new("RGB", (0, 4)), IMAGES[1]]
    result = reward(folder, legacy=legacy).score(images, [""] * 3, ROWS[:3])
    alone = reward(folder).score([IMAGES[0], IMAGES[1]], [""] * 2, [ROWS[0], ROWS[2]])
    np.testing.assert_allclose(result.scores, [alone.scores[0], np.nan, alone.scores[1]], atol=1e-6)
    assert result.details["reason"] == [None, "the image is empty, 0 x 4 pixels", None]


def test_numbers_that_are_none_are_dropped():
    scores, reasons = np.array([0.5, np.nan, np.inf, np.nan]), [None, None, None, "asleep"]
    drop_infinite(scores, reasons)
    np.testing.assert_equal(scores, [0.5, np.nan, np.nan, np.nan])
    assert reasons == [
        None,
        "the model gives nan; use dtype float32",
        "the model gives inf; use dtype float32",
        "asleep",
    ]


def test_foreign_metadata_are_refused(folder):
    with pytest.raises(ValueError, match="have no 'task_type'"):
        reward(folder).score(IMAGES[:1], ["a photo of a cat"], [{}])


def test_the_true_network_builds():
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 420,
        "patch_size": 14,
    }
    with torch.device("meta"):
        model = GitForCausalLM(GitConfig(vision_config=vision))
    assert sum(parameter.numel() for parameter in model.parameters()) == 394_855_482


def test_building_needs_neither_torch_nor_weights():
    code = (
        "import sys; from stage_grpo.rewards.git import GitReward; GitReward();"
        "sys.exit(','.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
