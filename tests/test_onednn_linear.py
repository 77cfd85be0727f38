"""Linear layers by oneDNN: as good as PyTorch's own, and used where they are faster."""

import builtins
import copy
import io
import platform

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from conftest import PROMPTS
from stage_grpo import devices, onednn_linear
from stage_grpo import trainer as trainer_module
from stage_grpo.onednn_linear import OneDnnLinear, onednn_pays, use_onednn
from stage_grpo.policy import load_policy
from stage_grpo.rewards import loading
from stage_grpo.rewards.loading import load_model
from stage_grpo.trainer import StageTrainer
from test_trainer import brightness, config


def pair(bias=True, inputs=192, outputs=64):
    """A layer and itself by oneDNN."""
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=bias)
    fast = copy.deepcopy(plain)
    use_onednn(fast)
    assert type(fast) is OneDnnLinear
    return plain, fast


def results(layer, x, dtype=torch.float32):
    """Output and all gradients, of a loss that is not linear."""
    layer = copy.deepcopy(layer).to(dtype)
    x = x.detach().to(dtype).requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(300,), (1,), (3, 7), (2, 3, 36), (0,), (2, 0), ()])
def test_it_is_no_further_from_float64_than_pytorchs(shape, bias):
    plain, fast = pair(bias)
    x = torch.randn(*shape, 192)
    for exact, own, theirs in zip(results(plain, x, torch.float64), results(fast, x), results(plain, x)):
        assert own.shape == theirs.shape == exact.shape and own.dtype == torch.float32
        assert own.is_contiguous() == theirs.is_contiguous()
        if exact.numel():
            scale = exact.abs().max()
            assert (own - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6 * scale


def test_gradients_agree_with_finite_differences(monkeypatch):
    """With the product taken in float64, which oneDNN does not have: the backward pass is the right one."""
    monkeypatch.setattr(onednn_linear, "onednn_product", nn.functional.linear)
    _, fast = pair(inputs=5, outputs=3)
    x, weight, bias = torch.randn(2, 4, 5), fast.weight, fast.bias
    given = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(onednn_linear._Linear.apply, given)


def test_only_what_is_asked_for_gets_a_gradient():
    plain, fast = pair()
    x = torch.randn(10, 192)
    for layer in (plain, fast):
        layer.weight.requires_grad_(False)
        layer(x).sum().backward()  # x needs none
        assert layer.weight.grad is None and layer.bias.grad.tolist() == [10.0] * 64
    with torch.no_grad():
        assert not fast(x).requires_grad


def test_inputs_that_are_views():
    plain, fast = pair()
    wide = torch.randn(192, 40, 3).permute(2, 1, 0)
    torch.testing.assert_close(fast(wide), plain(wide), atol=1e-5, rtol=0)
    torch.testing.assert_close(fast(wide[:, ::7]), plain(wide[:, ::7]), atol=1e-5, rtol=0)


def test_other_dtypes_and_autocast_are_pytorchs():
    plain, fast = pair()
    x = torch.randn(5, 192)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16 and torch.equal(fast(x), plain(x))
    assert torch.equal(fast.double()(x.double()), plain.double()(x.double()))


def test_a_models_weights_and_names_stay():
    plain, fast = (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)) for _ in range(2))
    names = list(fast.state_dict())
    use_onednn(fast)
    fast.load_state_dict(plain.state_dict())
    assert list(fast.state_dict()) == names
    assert [type(part) for part in fast] == [OneDnnLinear, nn.GELU, OneDnnLinear]
    assert [type(part) for part in copy.deepcopy(fast)] == [OneDnnLinear, nn.GELU, OneDnnLinear]
    adapted = get_peft_model(fast, LoraConfig(target_modules=["0"]))
    assert type(adapted.base_model.model[0].base_layer) is OneDnnLinear


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_policy_scores_and_learns_as_before(checkpoint, checkpointing):
    """Also with activations computed anew in the backward pass, and the decoder still knows the layers."""
    codes = torch.arange(2 * 36).reshape(2, 36) % 512
    found = []
    for change in (lambda policy: None, use_onednn):
        policy = load_policy(checkpoint).train()
        change(policy)
        if checkpointing:
            policy.activation_checkpointing_enable()
        ids = torch.tensor([[0, 5, 6, 7], [0, 7, 6, 5]])
        mask = policy.attention_mask_with_image(torch.ones_like(ids))
        logits = policy.image_logits(policy.head_features(torch.cat([ids, codes], dim=1), mask))
        logits.log_softmax(-1)[..., 0].mean().backward()
        assert policy.make_decoder(64) is not None
        found.append([logits.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for theirs, ours in zip(*found):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("vendor", "capability", "pays"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
    ],
)
def test_it_is_used_where_it_pays(monkeypatch, vendor, capability, pays):
    monkeypatch.setattr(onednn_linear, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert onednn_pays.__wrapped__() == (pays and onednn_linear.onednn_available())


def test_the_vendor_is_read_from_the_system(monkeypatch):
    info = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t: 2\n\nprocessor\t: 1\nvendor_id\t: AuthenticAMD\n"
    real = builtins.open
    answers = {"/proc/cpuinfo": info}
    monkeypatch.setattr(devices.os.path, "exists", lambda path: path in answers)
    fake = lambda path, *a, **k: io.StringIO(answers[path]) if path in answers else real(path, *a, **k)  # noqa: E731
    monkeypatch.setattr(builtins, "open", fake)
    assert devices.cpu_vendor() == "AuthenticAMD"
    answers["/proc/cpuinfo"] = "processor\t: 0\nCPU implementer\t: 0x41\n"
    assert devices.cpu_vendor() == ""
    answers.clear()
    monkeypatch.setattr(platform, "processor", lambda: "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD")
    assert devices.cpu_vendor() == "AuthenticAMD"


@pytest.mark.parametrize("pays", [True, False])
def test_a_trainer_uses_it_for_policy_and_reference(checkpoint, tmp_path, monkeypatch, pays):
    monkeypatch.setattr(trainer_module, "onednn_pays", lambda: pays)
    rows = Dataset.from_dict({"prompt": PROMPTS, "metadata": ["{}"] * len(PROMPTS)})
    trainer = StageTrainer(load_policy(checkpoint), brightness, config(tmp_path, max_steps=1), rows)
    for model in (trainer.model, trainer.ref_model):
        kinds = {type(part) for part in model.modules() if isinstance(part, nn.Linear)}
        assert kinds == {OneDnnLinear if pays else nn.Linear}


@pytest.mark.parametrize("pays", [True, False])
def test_models_of_rewards_take_it_where_it_pays(tmp_path, monkeypatch, pays):
    layout = CLIPTextConfig(vocab_size=10, hidden_size=8, intermediate_size=16, num_hidden_layers=1)
    layout.num_attention_heads, layout.max_position_embeddings = 2, 4
    CLIPTextModel(layout).save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "onednn_pays", lambda: pays)
    kinds = {type(layer) for layer in load_model(CLIPTextModel, tmp_path, "cpu", "float32").modules()}
    assert (OneDnnLinear in kinds, nn.Linear in kinds) == (pays, not pays)
