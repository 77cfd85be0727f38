"""MANIQA around a stand-in of pyiqa, which is an extra: what it loads, from where, and what it refuses."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from stage_grpo.rewards.maniqa import ManiqaOptions, ManiqaReward
from stage_grpo.rewards.registry import build_reward

IMAGES = [Image.new("RGB", size, grey) for size, grey in (((8, 8), "#333"), ((8, 8), "#666"), ((4, 6), "#fff"))]
LEVELS = [0.2, 0.4, 1.0]
"""Grey levels of the images in [0, 1]."""


class Fetched(list):
    """Addresses that were asked for, and the file that lies there."""

    file = None


@pytest.fixture
def fetched(monkeypatch):
    """Puts a pyiqa in place whose metric is gain x mean grey; gives what it was asked to fetch."""
    fetched = Fetched()

    def create_vit(name, pretrained):
        fetched.extend([name] if pretrained else [])
        return torch.nn.Linear(1, 1, bias=False)

    def load_file_from_url(url):
        fetched.append(url)
        return fetched.file

    class Metric(torch.nn.Module):
        def __init__(self, pretrained=True):
            super().__init__()
            self.net = torch.nn.Module()
            self.net.vit = arch.timm.create_model("vit_base_patch8_224", pretrained=True)
            self.net.gain = torch.nn.Parameter(torch.zeros(1))
            assert not pretrained

        def forward(self, x):
            assert x.shape[1] == 3
            return self.net.gain * x.mean(dim=(1, 2, 3))[:, None]

    arch = SimpleNamespace(timm=SimpleNamespace(create_model=create_vit), default_model_urls={"koniq": "the-url"})
    strip = lambda tensors: {name.removeprefix("module."): tensor for name, tensor in tensors.items()}  # noqa: E731
    util = SimpleNamespace(load_file_from_url=load_file_from_url, clean_state_dict=strip)
    pyiqa, archs = ModuleType("pyiqa"), ModuleType("pyiqa.archs")
    pyiqa.create_metric = lambda name, device, as_loss, pretrained: Metric(pretrained)
    archs.arch_util, archs.maniqa_arch = util, arch
    monkeypatch.setitem(sys.modules, "pyiqa", pyiqa)
    monkeypatch.setitem(sys.modules, "pyiqa.archs", archs)
    monkeypatch.setattr(ManiqaReward, "packages", ())
    yield fetched
    assert arch.timm.create_model is create_vit


def scores(file, **options):
    return build_reward("maniqa", {"weights": str(file), **options}).score(IMAGES, [""] * 3).scores


TENSORS = {"vit.weight": torch.ones(1, 1), "gain": torch.tensor([0.5])}


@pytest.mark.parametrize(
    "content",
    [TENSORS, {"params": TENSORS}, {f"module.{name}": tensor for name, tensor in TENSORS.items()}],
    ids=["as published", "as pyiqa saves", "as trained in parallel"],
)
def test_a_file_of_weights_is_all_it_needs(fetched, tmp_path, content):
    torch.save(content, tmp_path / "maniqa.pt")
    np.testing.assert_allclose(scores(tmp_path / "maniqa.pt"), 0.5 * np.array(LEVELS), atol=1e-6)
    assert fetched == []


def test_without_a_file_pyiqa_fetches_its_own_alone(fetched, tmp_path):
    torch.save(TENSORS, tmp_path / "fetched.pt")
    fetched.file = tmp_path / "fetched.pt"
    result = build_reward("maniqa").score(IMAGES[:1], [""])
    assert result.scores == pytest.approx([0.1], abs=1e-6) and fetched == ["the-url"]


def test_batches_of_one_size_are_cut_where_sizes_change(fetched, tmp_path):
    torch.save(TENSORS, tmp_path / "maniqa.pt")
    np.testing.assert_array_equal(scores(tmp_path / "maniqa.pt", batch_size=1), scores(tmp_path / "maniqa.pt"))


def test_files_that_are_no_maniqa_are_refused(fetched, tmp_path):
    torch.save({"gain": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt does not hold MANIQA's weights; give ckpt_koniq10k\.pt"):
        scores(tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"gone\.pt' is no file"):
        scores(tmp_path / "gone.pt")


def test_code_in_a_file_of_weights_does_not_run(fetched, tmp_path):
    torch.save({"params": Image.new("L", (1, 1))}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code\.pt does not hold MANIQA's weights"):
        scores(tmp_path / "code.pt")


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype='bfloat16': pyiqa computes maniqa in float32; leave dtype out"):
        ManiqaOptions(dtype="bfloat16")


def test_a_torchvision_of_another_torch_is_named(fetched, monkeypatch, tmp_path):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "pyiqa":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "pyiqa")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ValueError, match=r"nms does not exist\); install the torchvision that belongs to torch"):
        scores(tmp_path / "unread.pt")
