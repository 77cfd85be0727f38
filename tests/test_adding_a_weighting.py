"""docs/adding_a_weighting.md as it stands: its blocks run, and its weightings train."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from stage_grpo.config import parse_config
from stage_grpo.weighting.registry import WEIGHTINGS, build_weighting
from test_trainer import logged, scored_batch, trainer_for

PAGE = Path(__file__).parents[1] / "docs" / "adding_a_weighting.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def my_weights(tmp_path, monkeypatch):
    """The page's blocks as the module that the page's configuration names. Importing it runs the page's tests."""
    monkeypatch.setitem(WEIGHTINGS, "centre", "")  # so that the page's own line is undone
    (tmp_path / "my_weights.py").write_text("\n".join(BLOCKS))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("my_weights")
    yield module
    sys.modules.pop("my_weights")


def test_a_weighting_is_one_short_file():
    function, weighting = BLOCKS[0], BLOCKS[1]
    assert len(function.splitlines()) < 10 and "return" in function
    assert len(function.splitlines() + weighting.splitlines()) < 40, "a new weighting no longer fits in 40 lines"


def test_the_page_runs_and_its_function_trains(my_weights, checkpoint, tmp_path):
    trainer = trainer_for(
        checkpoint, tmp_path, preset="grpo", token_weighting="my_weights:uncertain",
        token_weighting_options={"power": 0.5}, max_steps=1,
    )  # fmt: skip
    trainer.train()
    (row,) = [row for row in logged(tmp_path) if "reward" in row]
    assert row["advantage_weights/mean"] == pytest.approx(1, abs=1e-5) and row["advantage_weights/std"] > 0
    assert "similarity/mean" not in row and "kl_weights/mean" not in row


def test_the_pages_class_weighs_both_parts_of_the_loss(my_weights, checkpoint, tmp_path):
    trainer = trainer_for(
        checkpoint,
        tmp_path,
        preset="grpo",
        token_weighting="my_weights:Centre",
        token_weighting_options={"width": 2.0},
    )
    batch = scored_batch(trainer)
    near = batch["advantage_weights"]
    assert torch.equal(batch["kl_weights"], 2 - near) and near.unique().numel() > 3
    rewritten = batch["advantages"] / near
    torch.testing.assert_close(rewritten, rewritten[:, :1].expand_as(near), atol=1e-5, rtol=0)
    assert len(trainer._metrics["train"]["near/mean"]) == 1
    with pytest.raises(ValueError, match=r"my_weights:Centre.*width=-1.* must be above 0"):
        build_weighting("my_weights:Centre", {"width": -1})


def few(codes, advantages, *, power=1.0):
    return codes


def starred(*batch, power=1.0):
    return batch[0]


def test_a_function_must_take_what_it_is_given():
    message = (
        rf"'{__name__}:few' takes \(codes, advantages, \*, power=1.0\); write it as weights\(codes, advantages, e"
    )
    with pytest.raises(ValueError, match=message):
        build_weighting(f"{__name__}:few", {"power": 2.0})
    build_weighting(f"{__name__}:starred", {"power": 2.0})


def test_the_yaml_of_the_page_is_read(my_weights, tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "run.yaml").write_text(f"output_dir: {tmp_path}\n" + block)
    config = parse_config("stage train", [str(tmp_path / "run.yaml")])
    assert (config.token_weighting, config.token_weighting_options) == ("my_weights:uncertain", {"power": 0.5})
    words = ["--output_dir", str(tmp_path), "--token_weighting", "my_weights:uncertain"]
    config = parse_config("stage train", [*words, "--token_weighting_options", '{"power": 2.0}'])
    assert config.token_weighting_options == {"power": 2.0}
