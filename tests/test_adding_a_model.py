"""The model of docs/adding_a_model.md, taken from the page as it stands, held to the laws of every family."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import PROMPTS
from stage_grpo import launch
from stage_grpo.cli import main
from stage_grpo.config import StageConfig
from stage_grpo.planning.sizes import policy_sizes
from stage_grpo.policy import left_pad, load_policy, load_tokenizer
from stage_grpo.policy.loading import POLICIES
from stage_grpo.rollout import decode_images, rollout
from stage_grpo.sampling import Sampling, image_uniforms
from stage_grpo.shapes.tiny import build_text_tokenizer
from stage_grpo.trainer import StageTrainer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adding_a_model.md"


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory):
    """The page's code blocks as an importable module; its name is taken out of the table again."""
    folder = tmp_path_factory.mktemp("family")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 6
    (folder / "mosaic.py").write_text("\n".join(blocks))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("mosaic")
    del POLICIES["mosaic"]


@pytest.fixture(scope="module")
def folder(mosaic, tmp_path_factory):
    """A checkpoint with random weights that are spread enough to make distributions peaked."""
    tokenizer = build_text_tokenizer()
    torch.manual_seed(0)
    config = mosaic.MosaicConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    policy = mosaic.MosaicPolicy(config)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    path = tmp_path_factory.mktemp("mosaic")
    policy.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def policy(folder):
    return load_policy(folder).eval()


def sampled(policy, prompts, guidance_scale=3.0):
    ids = policy.encode_prompts(load_tokenizer(policy), prompts)
    uniforms = image_uniforms([(7, i) for i in range(len(prompts))], policy.num_image_tokens)
    return rollout(policy, ids, uniforms, Sampling(guidance_scale))


@torch.no_grad()
def teacher_forced(policy, result):
    ids, mask = left_pad(result.prompt_ids, policy.pad_token_id)
    full, mask = torch.cat([ids, result.codes], dim=1), policy.attention_mask_with_image(mask)
    logits = policy.image_logits(policy.head_features(full, mask))
    return torch.log_softmax(logits, dim=-1).gather(-1, result.codes[..., None]).squeeze(-1)


def test_the_loader_finds_the_family_by_its_model_type(policy, mosaic):
    assert type(policy) is mosaic.MosaicPolicy and policy.num_image_tokens == 16
    training = {name.split(".")[0] for name, p in policy.named_parameters() if p.requires_grad}
    assert training == {"model"}


@pytest.fixture
def as_in_a_new_process(mosaic, monkeypatch):
    """The family is in the table, but its module is not imported yet, so transformers does not know it."""
    monkeypatch.delitem(sys.modules, "mosaic")
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "mosaic")


def test_a_plan_counts_the_family(policy, folder, as_in_a_new_process):
    sizes = policy_sizes(folder, "float32")
    assert sizes.total == sum(sizes.parts.values()) == sum(p.numel() for p in policy.parameters())
    assert sizes.language_model == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    # The head's two layers of 32 x 32 and 32 x 27; a code is looked up, not multiplied.
    assert (sizes.head_matmul, sizes.code_matmul) == (32 * 32 + 32 * 27, 0)


def test_plan_and_launch_take_the_family(folder, as_in_a_new_process, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 8)
    words = ["configs/train/geneval.yaml", "--model", folder, "--train_prompts", "assets/shapes/train.jsonl"]
    words += ["--rewards", "shapes", "--save_strategy", "no"]
    main(["plan", *words])
    assert f"{64 * 16 * 1600:,}" in capsys.readouterr().out  # image tokens of the run
    main(["launch", *words, "--dry-run"])
    out = capsys.readouterr().out
    assert "nothing is missing" in out and f"--model {folder}" in out


def test_colours_and_their_vectors_by_hand(policy):
    # 5 = 0 * 9 + 1 * 3 + 2: no red, half green, full blue.
    codes = torch.tensor([[5] + [26] * 14 + [0]])
    assert policy.code_vectors(codes)[0, 0].tolist() == [-1, 0, 1]
    pixels = policy.decode(codes)[0]
    assert pixels.shape == (32, 32, 3) and pixels[7, 7].tolist() == [0, 127, 254]
    assert pixels[7, 8].tolist() == pixels[8, 7].tolist() == [254] * 3 and pixels[31, 31].tolist() == [0] * 3


def test_recorded_log_probabilities_equal_teacher_forced_ones(policy):
    result = sampled(policy, [prompt for prompt in PROMPTS for _ in range(2)])
    assert len(torch.unique(result.codes)) > 5 and result.logps.std() > 0.1
    torch.testing.assert_close(result.logps, teacher_forced(policy, result), atol=1e-4, rtol=0)
    policy.scoring_guidance = 3.0
    torch.testing.assert_close(result.guided_logps, teacher_forced(policy, result), atol=1e-4, rtol=0)


def test_a_sample_does_not_depend_on_its_batch(policy):
    together = sampled(policy, PROMPTS)
    ids = together.prompt_ids[3:]
    alone = rollout(policy, ids, image_uniforms([(7, 3)], 16), Sampling(3.0))
    assert torch.equal(alone.codes, together.codes[3:])
    torch.testing.assert_close(alone.logps, together.logps[3:], atol=1e-5, rtol=0)
    pixels = decode_images(policy, together.codes)
    assert (pixels[3] == decode_images(policy, alone.codes)[0]).all()


def test_stage_trains_the_backbone_alone_against_a_reference_of_the_same_class(policy, folder, mosaic, tmp_path):
    def redness(images, prompts, metadata):
        return [sum(image.getchannel("R").tobytes()) / 32**2 / 255 for image in images]

    args = StageConfig(
        str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        guidance_scale=3.0,
        guidance_in_scoring=True,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        sample_steps=0,
    )
    trainer = StageTrainer(policy, redness, args, Dataset.from_dict({"prompt": PROMPTS}))
    assert type(trainer.ref_model) is mosaic.MosaicPolicy
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    trainer.train()
    first, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:2]]
    assert first["kl"] == 0.0 and first["entropy/gap"] < 1e-4 and second["kl"] > 1e-6
    assert first["advantage_weights/std"] > 0 and 0 < first["rewards/redness/mean"] < 1
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("model.")}

    trainer.save_model(str(tmp_path / "saved"))
    loaded = load_policy(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in policy.state_dict().items())
