"""LoRA on disk: what a run leaves loads, generates and merges as one policy."""

import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, JanusForConditionalGeneration

from conftest import PROMPTS
from original_janus import write_original
from stage_grpo import ImagePipeline
from stage_grpo.checkpoints import convert
from stage_grpo.checkpoints.template import trained_template
from stage_grpo.cli import main
from stage_grpo.merge import merge
from stage_grpo.planning.setting import LORA_TARGETS
from stage_grpo.policy import left_pad, load_policy, load_tokenizer
from stage_grpo.policy.adapters import Adapter, merge_adapter, read_adapter
from stage_grpo.policy.loading import checkpoint_of
from stage_grpo.training import train
from test_trainer import config

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """Output folder of two steps of LoRA training on the tiny Janus."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    changes = {"learning_rate": 1e-2, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "use_peft": True}
    train(
        config(
            folder / "run",
            model=checkpoint,
            train_prompts=str(folder / "prompts.txt"),
            rewards=["test_trainer:brightness"],
            **changes,
        )
    )
    return folder / "run"


@pytest.fixture(scope="module")
def merged(run):
    return merge(run, run.parent / "merged")


@torch.no_grad()
def outputs(policy, checkpoint):
    """Head features and image logits of fixed prompts and codes."""
    tokenizer = load_tokenizer(policy, checkpoint)
    ids, mask = left_pad(policy.encode_prompts(tokenizer, PROMPTS), policy.pad_token_id)
    count = policy.num_image_tokens
    codes = torch.randint(64, (len(PROMPTS), count), generator=torch.Generator().manual_seed(0))
    features = policy.head_features(torch.cat([ids, codes], dim=1), policy.attention_mask_with_image(mask))
    return features, policy.image_logits(features)


def assert_close(one, other, atol):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def assert_same_weights(policy, other):
    one, two = policy.state_dict(), other.state_dict()
    assert one.keys() == two.keys() and len(one) > 100
    assert all(torch.equal(tensor, two[name]) and tensor.dtype == two[name].dtype for name, tensor in one.items())


def adapted(policy, dtype=torch.float32):
    """Weights that the adapters of these tests change."""
    names = [name for name, _ in policy.named_parameters() if "language_model.layers" in name and "_proj." in name]
    return {name: policy.get_parameter(name).detach().to(dtype) for name in names}


def test_a_run_folder_and_its_checkpoints_load_as_the_adapted_policy(checkpoint, run):
    base = load_policy(checkpoint)
    plain = outputs(base, checkpoint)
    expected = outputs(PeftModel.from_pretrained(base, str(run)).get_base_model(), checkpoint)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(expected, plain))
    for folder in (run, run / "checkpoint-2"):
        assert_close(outputs(load_policy(folder), checkpoint), expected, atol=1e-5)
    first = outputs(load_policy(run / "checkpoint-1"), checkpoint)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(first, expected))


def test_merged_weights_are_the_sum_written_out(checkpoint, run):
    before, after = adapted(load_policy(checkpoint), torch.float64), adapted(load_policy(run), torch.float64)
    factors = load_file(run / WEIGHTS)
    assert len(before) == len(factors) / 2 == 2 * 7
    for name, weight in before.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        a, b = (factors[f"{stem}.lora_{letter}.weight"].double() for letter in "AB")
        torch.testing.assert_close(after[name], weight + 32 / 16 * b @ a, atol=1e-6, rtol=0)
        assert not torch.equal(after[name], weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loaded_policy_is_an_ordinary_one(checkpoint, run, dtype):
    base, policy = load_policy(checkpoint, dtype), load_policy(run, dtype)
    assert [(n, type(m)) for n, m in policy.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == flags and len(set(flags.values())) == 2
    assert policy.training == base.training
    assert {**policy.config.to_dict(), "_name_or_path": None} == {**base.config.to_dict(), "_name_or_path": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(policy, LoraConfig(target_modules=LORA_TARGETS))


def test_loading_draws_no_random_numbers(checkpoint, run):
    states = []
    for folder in (checkpoint, run):
        torch.manual_seed(0)
        load_policy(folder)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_the_tokenizer_comes_from_the_base(checkpoint, run):
    base, policy = load_policy(checkpoint), load_policy(run)
    ids = [p.encode_prompts(load_tokenizer(p), PROMPTS) for p in (base, policy)]
    assert ids[0] == ids[1] and base.pad_token_id == policy.pad_token_id
    assert checkpoint_of(policy) == checkpoint_of(base) == checkpoint


def pixels(paths):
    return [Image.open(path).tobytes() for path in paths]


def test_run_and_merged_checkpoint_draw_the_same_images(checkpoint, run, merged, tmp_path):
    for name, model in (("run", run), ("merged", merged), ("base", checkpoint)):
        words = ["--prompts", str(run.parent / "prompts.txt"), "--guidance-scale", "3", "--out", str(tmp_path / name)]
        main(["generate", "--model", str(model), *words])
    images = sorted((tmp_path / "run").glob("*/samples/*.png"))
    others = {n: [(tmp_path / n / p.relative_to(tmp_path / "run")) for p in images] for n in ("merged", "base")}
    assert len(images) == 4 and pixels(images) == pixels(others["merged"])
    assert all(p != q for p, q in zip(pixels(images), pixels(others["base"])))


def test_the_merged_checkpoint_is_whole_and_plain(checkpoint, run, merged, tmp_path):
    plain, report = JanusForConditionalGeneration.from_pretrained(merged, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_weights(plain, load_policy(run))
    load_policy(checkpoint).save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((merged / name).read_text()) == json.loads((tmp_path / name).read_text())
    processors = [AutoProcessor.from_pretrained(folder) for folder in (merged, checkpoint)]
    assert processors[0].to_dict() == processors[1].to_dict()
    assert processors[0].tokenizer.get_vocab() == processors[1].tokenizer.get_vocab()
    record = json.loads((merged / "merge.json").read_text())
    assert (record["adapter"], record["base"], record["lora_r"]) == (str(run), checkpoint, 16)
    assert list(merged.parent.glob(".merged*")) == []


def test_the_prompt_template_stays_with_the_weights_on_every_way(run, tmp_path):
    trained = tmp_path / "run"
    shutil.copytree(run, trained, ignore=shutil.ignore_patterns("checkpoint-*"))
    record = json.loads((trained / "run.json").read_text())
    record["config"]["prompt_template"] = "t2i_r1"
    (trained / "run.json").write_text(json.dumps(record))
    merged = merge(trained, tmp_path / "merged" / "here")
    original = convert(merged, tmp_path / "original" / "here", to="original")
    again = convert(original, tmp_path / "again" / "here")
    assert {trained_template(folder) for folder in (trained, merged, original, again)} == {"t2i_r1"}
    assert ImagePipeline.from_pretrained(again).prompt_template == "t2i_r1"


def test_bfloat16_is_rounded_once_and_computed_tables_stay_exact(checkpoint, run, tmp_path):
    exact = load_policy(run)
    merge(run, tmp_path / "merged", dtype="bfloat16")
    stored, direct = load_policy(tmp_path / "merged", "auto"), load_policy(run, "bfloat16")
    assert stored.dtype == torch.bfloat16
    assert_same_weights(stored, direct)
    for policy in (stored, direct):
        assert all(torch.equal(p, exact.get_parameter(n).bfloat16()) for n, p in policy.named_parameters())
        assert all(torch.equal(b, exact.get_buffer(n)) for n, b in policy.named_buffers())


def test_a_bfloat16_base_keeps_its_dtype_and_can_be_widened(checkpoint, run, tmp_path):
    load_policy(checkpoint, "bfloat16").save_pretrained(tmp_path / "base")
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "base")
    base = adapted(load_policy(tmp_path / "base"))
    change = {
        n: w - b for (n, w), b in zip(adapted(load_policy(run)).items(), adapted(load_policy(checkpoint)).values())
    }
    wide = adapted(load_policy(run, base=tmp_path / "base"))
    for name, weight in wide.items():
        torch.testing.assert_close(weight, base[name] + change[name], atol=1e-6, rtol=0)
    merge(run, tmp_path / "merged", base=tmp_path / "base")
    kept = load_policy(tmp_path / "merged", "auto")
    assert kept.dtype == torch.bfloat16
    assert all(torch.equal(kept.get_parameter(n), w.bfloat16()) for n, w in wide.items())


@pytest.mark.parametrize(("change", "share"), [(2**-9, 1.0), (2**-7, 0.0), (3 * 2**-8, 1 / 3)])
def test_what_rounding_costs_is_measured(checkpoint, run, change, share):
    # Beside 1, bfloat16 has steps of 2^-7: a change of a quarter step is lost, of a whole step kept; one and a half
    # steps become two (ties to even: 1 + 2^-7 is odd), half a step of one and a half.
    policy = load_policy(checkpoint)
    with torch.no_grad():
        for name in adapted(policy):
            policy.get_parameter(name).fill_(1)
    shapes = {name: tensor.shape for name, tensor in read_adapter(run).tensors.items()}
    ones = {n: torch.ones(1, s[1]) if "lora_A" in n else change * torch.ones(s[0], 1) for n, s in shapes.items()}
    small = Adapter(run, checkpoint, LoraConfig(r=1, lora_alpha=1, target_modules=LORA_TARGETS), ones)
    assert merge_adapter(policy, small, torch.bfloat16) == pytest.approx(share, abs=1e-6)


def test_a_base_in_the_original_format_and_half_precision_factors(weights, tmp_path):
    original = write_original(tmp_path / "original", weights)
    model = get_peft_model(load_policy(original), LoraConfig(r=2, target_modules=LORA_TARGETS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1)).bfloat16())
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    expected = outputs(model.eval().get_base_model(), None)
    for base in (None, original):
        assert_close(outputs(load_policy(tmp_path / "adapter", base=base), None), expected, atol=1e-5)
