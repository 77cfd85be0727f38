"""The decoding step of its own against the library's, and when it must not be used."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaModel

from stage_grpo.policy import decoder as module
from stage_grpo.policy.decode_cache import equal_lengths
from stage_grpo.policy.decoder import LlamaDecoder, why_not
from stage_grpo.policy.janus import JanusPolicy, _tell_once
from stage_grpo.policy.packed import can_pack, linear_function
from stage_grpo.policy.steps import DecoderSteps, GenericSteps
from stage_grpo.rollout import bytes_per_row, rollout
from stage_grpo.sampling import Sampling, image_uniforms
from stage_grpo.shapes import tiny

GUIDED = Sampling(guidance_scale=3.0)
RECORDS = ("codes", "logps", "entropies", "guided_logps", "guided_entropies")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CONFIGS = {
    "plain": {},
    "grouped queries": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32},
    "wide heads": {"head_dim": 64},
    "other theta and eps": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-3},
    "scaled rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
}


def random_policy(tokenizer, **changes):
    config = tiny.build_config(tokenizer)
    for name, value in changes.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    policy = JanusPolicy(config).eval()
    with torch.no_grad():
        policy.get_output_embeddings().weight.normal_(0, 0.3)
        for parameter in policy.backbone.parameters():
            parameter.normal_(0, 0.08) if parameter.dim() == 2 else parameter.uniform_(0.5, 1.5)
    return policy


def make_decoder(policy, prompt_ids):
    built = policy.make_decoder(max(map(len, prompt_ids)) + policy.num_image_tokens)
    assert isinstance(built, LlamaDecoder)
    return built


@torch.no_grad()
def logits_along(steps, codes):
    """Logits of all steps that are fed given codes, (T, R, V)."""
    found = [steps.logits(steps.features)]
    for column in codes.T:
        steps.advance(column)
        found.append(steps.logits(steps.features))
    return torch.stack(found)


@pytest.fixture
def by_length(prompt_ids):
    return sorted(prompt_ids, key=len)


@pytest.fixture
def codes(prompt_ids):
    return torch.randint(512, (len(prompt_ids), 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def uniforms(prompt_ids):
    return image_uniforms([(0, i) for i in range(len(prompt_ids))], 36)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("guided", [True, False])
def test_logits_equal_those_of_the_library(tokenizer, by_length, codes, changes, guided):
    policy = random_policy(tokenizer, **changes)
    expected = logits_along(GenericSteps(policy, by_length, guided), codes)
    assert expected.std() > 0.5  # or the tolerance below would mean nothing
    for fixed in (False, True):
        steps = DecoderSteps(policy, make_decoder(policy, by_length), by_length, guided, fixed)
        torch.testing.assert_close(logits_along(steps, codes), expected, atol=2e-5, rtol=0)


def test_fixed_shapes_stay_fixed_within_a_window(policy, by_length, codes, monkeypatch):
    """What a CUDA graph replays: the same tensors at every step; a window of four grows as it fills."""
    monkeypatch.setattr("stage_grpo.policy.graphed.WINDOW", 4)
    steps = DecoderSteps(policy, make_decoder(policy, by_length), by_length, True, fixed=True)
    longest = max(map(len, by_length))
    places, windows = steps._step.cache.positions.data_ptr(), []
    for column in codes.T:
        steps.advance(column)
        windows.append(steps._step.cache.window)
    assert windows == [-(-(longest + t + 1) // 4) * 4 for t in range(5)]
    assert steps._step.cache.positions.data_ptr() == places
    assert steps._step.cache.positions.tolist() == [len(ids) + 5 for ids in by_length]


@pytest.mark.parametrize("sampling", [GUIDED, Sampling(1.0), Sampling(3.0, temperature=0.7, top_k=50)])
def test_rollouts_equal_those_of_the_generic_step(policy, prompt_ids, uniforms, sampling, monkeypatch):
    fast = rollout(policy, prompt_ids, uniforms, sampling)
    monkeypatch.setattr(JanusPolicy, "make_decoder", lambda *_: None)
    generic = rollout(policy, prompt_ids, uniforms, sampling)
    assert torch.equal(fast.codes, generic.codes) and fast.prompt_ids == generic.prompt_ids
    for name in RECORDS[1:]:
        torch.testing.assert_close(getattr(fast, name), getattr(generic, name), atol=5e-5, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_no_bit_depends_on_the_batch(policy, prompt_ids, uniforms, guidance):
    """Other rows, their prompts, their order and the size of chunks leave a row as it is, to the last bit."""
    sampling = Sampling(guidance)
    together = rollout(policy, prompt_ids, uniforms, sampling)
    in_chunks = rollout(
        policy, prompt_ids, uniforms, sampling, 5 * bytes_per_row(policy, max(map(len, prompt_ids)), guidance != 1)
    )
    for rows in ([7], [11, 0, 4]):
        alone = rollout(policy, [prompt_ids[i] for i in rows], uniforms[rows], sampling)
        for name in RECORDS:
            assert torch.equal(getattr(alone, name), getattr(together, name)[rows]), (rows, name)
    for name in RECORDS:
        assert torch.equal(getattr(in_chunks, name), getattr(together, name)), name


@pytest.mark.parametrize("record", ["conditional", "guided", "nothing"])
def test_what_is_not_recorded_is_nan_and_moves_no_code(policy, prompt_ids, uniforms, record):
    both = rollout(policy, prompt_ids, uniforms, GUIDED)
    some = rollout(policy, prompt_ids, uniforms, GUIDED, record=record)
    assert torch.equal(some.codes, both.codes)
    for name, kept in {"logps": "conditional", "guided_logps": "guided", "guided_entropies": "guided"}.items():
        found = getattr(some, name)
        assert torch.equal(found, getattr(both, name)) if record == kept else found.isnan().all()


def test_bfloat16_agrees_to_its_precision(policy, by_length, codes):
    policy = policy.to(torch.bfloat16)
    expected = logits_along(GenericSteps(policy, by_length, True), codes)
    found = logits_along(DecoderSteps(policy, make_decoder(policy, by_length), by_length, True), codes)
    exact = logits_along(GenericSteps(policy.float(), by_length, True), codes)
    # Both round to 8 bits at about the same places: neither may be further from float32 than the other.
    assert (found - exact).square().mean() < 1.2 * (expected - exact).square().mean()


def test_autocast_is_followed(policy, by_length, codes):
    exact = logits_along(GenericSteps(policy, by_length, True), codes)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits_along(GenericSteps(policy, by_length, True), codes)
        built = make_decoder(policy, by_length)
        found = logits_along(DecoderSteps(policy, built, by_length, True), codes)
    assert built.dtype == torch.bfloat16
    assert 0 < (found - exact).square().mean() < 1.2 * (expected - exact).square().mean()


def test_weights_are_read_anew_in_every_rollout(policy, prompt_ids, uniforms):
    before = rollout(policy, prompt_ids, uniforms, GUIDED)
    with torch.no_grad():
        policy.backbone.layers[1].mlp.down_proj.weight.mul_(1.5)
    assert not torch.equal(rollout(policy, prompt_ids, uniforms, GUIDED).logps, before.logps)


def test_weights_are_not_copied_where_memory_is_short(policy, by_length, codes, monkeypatch):
    usual = logits_along(DecoderSteps(policy, make_decoder(policy, by_length), by_length, True), codes)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(total=0))
    built = make_decoder(policy, by_length)
    found = logits_along(DecoderSteps(policy, built, by_length, True), codes)
    torch.testing.assert_close(found, usual, atol=2e-5, rtol=0)


def test_what_else_runs_on_a_machine_decides_nothing(policy, monkeypatch):
    """Fused products round in another way, so a rollout must not come to have them or not."""
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(total=2**40, available=0))
    assert module._copies_fit(policy.backbone, torch.float32)


def lora(policy, targets=("q_proj",), **changes):
    """Adapters that do something, and are not merged."""
    adapted = PeftModel(policy, LoraConfig(target_modules=list(targets), r=2, lora_alpha=6, **changes))
    fill_adapters(adapted)
    return adapted


def fill_adapters(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.08)


def two_adapters(policy):
    adapted = lora(policy, ALL_LINEAR)
    adapted.add_adapter("second", LoraConfig(target_modules=["v_proj", "down_proj"], r=3, lora_dropout=0.5))
    fill_adapters(adapted)
    adapted.base_model.set_adapter(["default", "second"])


ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTED = {
    "queries": lora,
    "all": lambda p: lora(p, ALL_LINEAR),
    "rank-stabilised": lambda p: lora(p, ["v_proj", "up_proj"], use_rslora=True),
    "two": two_adapters,
    "disabled": lambda p: lora(p).base_model.disable_adapter_layers(),
    "merged": lambda p: lora(p).merge_adapter(),
}


@pytest.mark.parametrize("change", ADAPTED.values(), ids=ADAPTED)
def test_adapters_are_followed(policy, by_length, codes, change):
    plain = logits_along(GenericSteps(policy, by_length, True), codes)
    change(policy)
    policy.eval()
    expected = logits_along(GenericSteps(policy, by_length, True), codes)
    assert torch.equal(expected, plain) == (change is ADAPTED["disabled"])
    steps = DecoderSteps(policy, make_decoder(policy, by_length), by_length, True)
    torch.testing.assert_close(logits_along(steps, codes), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_keep_their_precision_beside_bfloat16(policy, by_length, codes, autocast):
    """As PEFT has them: float32 adapters of a bfloat16 model, or all of them cast by autocast."""
    adapted = lora(policy, ALL_LINEAR).eval()
    exact = logits_along(GenericSteps(policy, by_length, True), codes)
    for name, parameter in adapted.named_parameters():
        if not autocast and "lora_" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = logits_along(GenericSteps(policy, by_length, True), codes)
        found = logits_along(DecoderSteps(policy, make_decoder(policy, by_length), by_length, True), codes)
    assert 0 < (found - exact).square().mean() < 1.2 * (expected - exact).square().mean()


def test_checkpointing_of_activations_does_not_matter(policy, prompt_ids, uniforms):
    """Its hook on the embeddings asks for gradients, and changes no number."""
    before = rollout(policy, prompt_ids, uniforms, GUIDED)
    policy.activation_checkpointing_enable()
    assert policy.get_input_embeddings()._forward_hooks
    assert isinstance(make_decoder(policy, prompt_ids), LlamaDecoder)
    assert torch.equal(rollout(policy, prompt_ids, uniforms, GUIDED).logps, before.logps)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


STRANGE = {
    "DoRA": (lambda p: lora(p, use_dora=True), "no plain LoRA but DoraLinearVariant"),
    "adapter with a bias": (lambda p: lora(p, lora_bias=True), "adapters have a bias"),
    "adapter of embeddings": (lambda p: lora(p, ["embed_tokens"]), "it is a peft"),
    "hook on an adapter": (
        lambda p: lora(p) and p.backbone.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None),
        "hook",
    ),
    "hook": (lambda p: p.backbone.layers[0].mlp.register_forward_hook(lambda *_: None), "hook"),
    "pre-hook": (lambda p: p.backbone.norm.register_forward_pre_hook(lambda *_: None), "hook"),
    "patch": (lambda p: setattr(p.backbone.layers[1].self_attn, "forward", lambda **_: None), "patched"),
    "parametrisation": (
        lambda p: parametrize.register_parametrization(p.backbone.layers[0].mlp.up_proj, "weight", Doubled()),
        "Parametrized",
    ),
    "shard": (
        lambda p: setattr(p.backbone.layers[0].mlp.up_proj, "weight", nn.Parameter(torch.empty(0))),
        r"shape \(0,\) instead of \(512, 192\): it is sharded",
    ),
    "mixed dtypes": (lambda p: p.backbone.layers[0].to(torch.bfloat16), "spread"),
    "eager attention": (lambda p: p.set_attn_implementation("eager"), "_attn_implementation is 'eager'"),
    "activation": (lambda p: setattr(p.backbone.config, "hidden_act", "gelu"), "hidden_act is 'gelu'"),
    "attention bias": (lambda p: setattr(p.backbone.config, "attention_bias", True), "attention_bias is True"),
    "rope": (
        lambda p: p.backbone.config.rope_parameters.update(rope_type="dynamic", factor=2.0),
        "rotary embedding is 'dynamic'",
    ),
}


@pytest.mark.parametrize(("change", "reason"), STRANGE.values(), ids=STRANGE)
def test_what_it_does_not_understand_is_left_to_the_library(policy, change, reason, caplog):
    assert why_not(policy.backbone) is None
    change(policy)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(why_not(policy.backbone))
    _tell_once.cache_clear()
    assert policy.make_decoder(64) is None and policy.make_decoder(64) is None
    (told,) = caplog.messages
    assert told == f"sampling takes transformers' own decoding step, which is slower: {why_not(policy.backbone)}"


def test_another_backbone_and_a_changed_head_are_left_to_the_library(policy):
    class Other(LlamaModel):
        pass

    small = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    assert why_not(Other(small)) == "the backbone is a Other"
    head = policy.model.generation_head
    hook = head.register_forward_hook(lambda *_: None)
    assert policy.make_decoder(64) is None
    hook.remove()
    assert policy.make_decoder(64) is not None
    lora(policy, ["generation_head.proj_out"])
    assert policy.make_decoder(64) is None


def test_an_adapter_that_is_not_merged_is_not_forgotten(policy, prompt_ids, uniforms):
    plain = rollout(policy, prompt_ids, uniforms, GUIDED)
    adapted = lora(policy).get_base_model()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.constant_(parameter, 0.05)
    assert not torch.equal(rollout(adapted, prompt_ids, uniforms, GUIDED).logps, plain.logps)


def test_packed_products_do_not_depend_on_rows_or_threads():
    draws = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(33, 1408, generator=draws), torch.randn(33, generator=draws)
    x = torch.randn(130, 1408, generator=draws)
    layer = linear_function(weight, bias)
    whole, threads = layer(x), torch.get_num_threads()
    torch.testing.assert_close(whole, nn.functional.linear(x, weight, bias), atol=1e-3, rtol=0)
    assert can_pack(weight)
    try:
        for threads_now in (1, 2):
            torch.set_num_threads(threads_now)
            for num_rows in (1, 2, 3, 6, 17, 64):
                assert torch.equal(layer(x[:num_rows]), whole[:num_rows]), (num_rows, threads_now)
    finally:
        torch.set_num_threads(threads)


def test_rows_of_equal_length_by_hand():
    assert equal_lengths([[1], [2], [1, 2], [1, 2, 3], [3, 2, 1]]) == [slice(0, 2), slice(2, 3), slice(3, 5)]


def test_the_benchmark_runs_and_says_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmark_of_rollout", BENCHMARKS / "rollout.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    out, picture = tmp_path / "new" / "result.json", tmp_path / "new" / "result.png"
    words = ["--size", "tiny", "--prompts", "2", "--images", "4", "--repeats", "1"]
    benchmark.main([*words, "--out", str(out), "--plot", str(picture)])
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    (run,) = row["runs"]
    assert (row["images"], row["group"], row["tokens"]) == (4, 2, 144)
    assert result["ratio_field_loop"] == run["field_loop"]["seconds"] / run["rollout"]["seconds"] > 0
    assert result["ratio_generate"] == run["generate"]["seconds"] / run["rollout"]["seconds"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG") and "x loop" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="size='7b' needs a GPU and this machine has none; use --size tiny or mid"):
        benchmark.main(["--size", "7b", "--out", str(out)])
    sys.modules.pop("field_loop")
