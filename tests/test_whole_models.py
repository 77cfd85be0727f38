"""ZeRO-3 splits every model that transformers loads; models of rewards, of whoever's making, stay whole."""

import sys

import numpy as np
import pytest
from PIL import Image
from transformers.integrations import deepspeed

from stage_grpo.rewards.base import FunctionReward, Reward
from stage_grpo.rewards.registry import build_reward
from stage_grpo.rewards.whole_models import whole_models


class Zero3:
    def is_zero3(self):
        return True


@pytest.fixture
def zero3():
    config = Zero3()  # transformers holds a weak reference alone
    deepspeed.set_hf_deepspeed_config(config)
    yield deepspeed.is_deepspeed_zero3_enabled
    deepspeed.unset_hf_deepspeed_config()


class Loading(Reward):
    """Looks where it would load: as it is built, and as it scores."""

    name = "loading"

    def __init__(self, options=None):
        super().__init__(options)
        self.found = [deepspeed.is_deepspeed_zero3_enabled()]

    def compute(self, images, prompts, metadata):
        self.found.append(deepspeed.is_deepspeed_zero3_enabled())
        return np.zeros(len(images))


def test_a_reward_of_ones_own_loads_its_model_whole(zero3):
    reward = build_reward(f"{__name__}:Loading")
    reward.score([Image.new("RGB", (4, 4))], ["a ring"])
    assert reward.found == [False, False] and zero3()
    found = []

    def failing(images, prompts, metadata):
        found.append(zero3())
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        FunctionReward(failing).score([Image.new("RGB", (4, 4))], ["a ring"])
    assert found == [False] and zero3()


def test_a_module_that_loads_as_it_is_imported(zero3, tmp_path, monkeypatch):
    (tmp_path / "eager_reward.py").write_text(
        "from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled\n"
        "FOUND = is_deepspeed_zero3_enabled()\n"
        "def score(images, prompts, metadata):\n    return [float(FOUND)] * len(images)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert build_reward("eager_reward:score").score([Image.new("RGB", (4, 4))], ["a ring"]).scores.tolist() == [0.0]
    assert zero3()


def test_blocks_of_several_threads_may_overlap(zero3):
    first, second = whole_models(), whole_models()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not zero3()
    second.__exit__(None, None, None)
    assert zero3()


def test_nothing_is_imported_for_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers.integrations.deepspeed")
    with whole_models():
        assert "transformers.integrations.deepspeed" not in sys.modules
