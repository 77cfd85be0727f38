"""What ``benchmarks/rewards.py`` measures with and builds, which the numbers in the documentation rest on."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

FOLDER = Path(__file__).parents[1] / "benchmarks"


def script(name):
    specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


bound = script("reward_bound")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_matrix_products_are_counted_with_their_shapes(context):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    heads = torch.ones(1, 2, 5, 8)
    with context(), bound.Products() as products:
        net(torch.ones(2, 3))
        torch.ones(7, 2, 3) @ torch.ones(7, 3, 5)
        torch.nn.functional.conv2d(torch.ones(1, 3, 4, 4), torch.ones(2, 3, 2, 2))
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    found = [(func._opname, count, args[-1].size) for (func, args, _), count in products.found.items() if count > 1]
    assert found == [("addmm", 2, (4, 4))]
    names = sorted(func._opname for func, _, _ in products.found)
    assert names[1:] == ["addmm", "addmm", "bmm", "convolution"] and names[0].startswith("_scaled_dot_product")
    assert products.seconds() > 0


def test_products_are_repeated_with_overlapping_tensors():
    with torch.no_grad(), bound.Products() as products:
        torch.bmm(torch.ones(1, 3, 4).expand(6, 3, 4), torch.ones(6, 4, 2))
    ((_, args, _),) = products.found
    again = args[0].fill()
    assert again.shape == (6, 3, 4) and torch.equal(again[0], again[5]) and again[0].unique().numel() == 12
    assert products.seconds() > 0


def test_only_outermost_calls_of_networks_are_timed(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(bound, "clock", lambda: next(ticks))
    inner = torch.nn.Linear(2, 2)
    with bound.time_in_networks() as calls:
        torch.nn.Sequential(inner, inner)(torch.ones(1, 2))
        inner(torch.ones(1, 2))
    inner(torch.ones(1, 2))
    assert calls == [1, 1]


def test_the_whole_judge_has_as_many_parameters_as_the_published_one():
    """The published index of Qwen2.5-VL 7B says 16,584,333,312 bytes of bfloat16."""
    random_rewards = script("random_rewards")
    with torch.device("meta"):
        judge = Qwen2_5_VLForConditionalGeneration(random_rewards.qwen_config(random_rewards.QWEN_LAYERS))
    assert 2 * sum(weight.numel() for weight in judge.parameters()) == 16_584_333_312
    assert judge.config.vision_config.fullatt_block_indexes == [7, 15, 23, 31]
    few = random_rewards.qwen_config(random_rewards.QWEN_FEW_LAYERS).vision_config
    assert (few.depth, few.fullatt_block_indexes) == (2, [1])
