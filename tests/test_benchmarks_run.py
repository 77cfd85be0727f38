"""The benchmarks of the training step run, and what they report adds up; at sizes of seconds."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stage_grpo import similarity
from stage_grpo import trainer as trainer_module
from stage_grpo.onednn_linear import OneDnnLinear
from stage_grpo.planning.sizes import policy_sizes

FOLDER = Path(__file__).parents[1] / "benchmarks"

sys.path.insert(0, str(FOLDER))  # they import one another
field_step, products, scaling, stage_step, step = map(
    importlib.import_module, ("field_step", "products", "scaling", "stage_step", "step")
)
sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A tiny Janus with images of four tokens."""
    return stage_step.write_checkpoint("grid", 2, tmp_path_factory.mktemp("grid") / "checkpoint")


MEMORY = {"ours": {"backward": 20, "reference": 10}, "field": {"backward": 30, "reference": 50}}


def remembered(command, **_):
    """Stands in for the process that measures a side's memory, most of whose time is importing."""
    assert command[:3] == [sys.executable, step.__file__, "--memory-of"] and len(command) == 9
    return subprocess.CompletedProcess(command, 0, stdout=json.dumps({"before": 1, "peaks": MEMORY[command[3]]}))


def test_the_step_against_the_fields_way(tmp_path, monkeypatch, capsys):
    """The command itself fails unless both sides' losses and gradients agree."""
    monkeypatch.setattr(step, "subprocess", SimpleNamespace(run=remembered))
    out = tmp_path / "step.json"
    words = [
        "--size",
        "tiny",
        "--group",
        "4",
        "--repeats",
        "1",
        "--threads",
        str(torch.get_num_threads()),
        "--out",
        str(out),
    ]
    step.main([*words, "--plot", str(tmp_path / "step.png")])
    result = json.loads(out.read_text())
    rows = {row["phase"]: row for row in result["phases"]}
    for side in ("ours", "field"):
        seconds = {name: row[f"seconds_{side}"] for name, row in rows.items()}
        parts = sum(seconds[name] for name in (*step.PHASES, "other"))
        assert parts == pytest.approx(seconds["step"])
        outside = sum(seconds[name] for name in step.OUTSIDE)
        assert seconds["scoring + update"] == pytest.approx(seconds["step"] - outside)
        # What both sides do was met on both.
        assert min(seconds[name] for name in ("rollout", "decode", "reference", "policy forward", "backward")) > 0
        assert result["products_seconds"][side] > 0
    assert rows["token ranks"]["seconds_ours"] == 0 and rows["token ranks"]["ratio"] is None
    assert result["ratio_scoring_update"] == rows["scoring + update"]["ratio"]
    assert result["loss"] != 0 and result["loss_difference"] < 1e-4 and result["gradient_difference"] < 1e-4
    assert (tmp_path / "step.png").stat().st_size > 0
    assert result["memory_ratio"] == 2.5  # 50 over 20
    assert "2.50" in capsys.readouterr().out.splitlines()[-1]


def test_linear_layers_by_either_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(products, "SHAPES", {"small": (20, 8, 16)})
    out = tmp_path / "new" / "products.json"
    products.main(["--repeats", "2", "--threads", str(torch.get_num_threads()), "--out", str(out)])
    row = json.loads(out.read_text())["layers"]["small"]
    assert 0 <= row["difference"] < 1e-5
    for part in products.PASSES:
        assert min(row[part].values()) > 0
    assert row["both"]["gflops_a_second"] == pytest.approx(6 * 20 * 8 * 16 / row["both"]["ours"] / 1e9)
    assert "small" in capsys.readouterr().out


def test_the_fields_side_has_the_librarys_linear_layers(grid, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "onednn_pays", lambda: True)
    trainer = stage_step.build_trainer(grid, tmp_path, 1, 4)
    layer = trainer.model.backbone.layers[0].mlp.up_proj
    assert type(layer) is OneDnnLinear
    with field_step.pytorchs_products(trainer.model, trainer.ref_model):
        assert type(layer) is torch.nn.Linear
        assert type(trainer.ref_model.backbone.layers[0].mlp.up_proj) is torch.nn.Linear
    assert type(layer) is OneDnnLinear


@pytest.mark.parametrize("side", ["ours", "field"])
def test_memory_is_looked_at_in_every_phase(side, grid, capsys):
    step.main_memory(side, str(grid), "4", "0", str(torch.get_num_threads()), "1")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    phases = {"reference", "policy forward", "token weights", "backward", "optimizer", "reward", "between phases"}
    assert found["peaks"].keys() == phases | ({"token ranks"} if side == "field" else {"rollout", "decode"})
    assert found["before"] > 1e8


def test_a_difference_between_the_sides_is_an_error():
    step.check_loss(1.0, 1.00009)
    with pytest.raises(ValueError, match=r"losses are 1.0 and 1.0002"):
        step.check_loss(1.0, 1.0002)
    with pytest.raises(ValueError, match="unfair"):
        step.check_loss(float("nan"), 1.0)


def test_the_fields_similarity_is_ours():
    vectors = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.2, 2.0, -3.0])
    ours = similarity.opposite_sign_similarity(vectors, advantages, 6)
    torch.testing.assert_close(field_step.pairwise_similarity(vectors, advantages), ours, atol=1e-6, rtol=0)


def test_ranks_by_hand(monkeypatch):
    monkeypatch.setattr(field_step, "TOP_K", 2)
    logits = torch.tensor([[[3.0, 2.0, 1.0]], [[0.0, 1.0, 2.0]]])  # two images of one token
    # Image 0 ranks code 0 first and code 1 second; image 1 code 2 first and code 1 second.
    assert field_step.token_ranks(logits, torch.tensor([[0], [1]])).tolist() == [[[0], [1]], [[-1], [1]]]


@pytest.mark.parametrize(("power", "constant"), [(0.0, 3.0), (1.0, 0.5), (2.0, 7.0)])
def test_exponents_of_powers(power, constant):
    rows = [{"number": n, "seconds": {"step": constant * n**power}} for n in (4, 8, 32)]
    assert scaling.slope(rows, "step") == pytest.approx(power)


def test_scaling_over_tokens_and_prompts(tmp_path, capsys):
    out = tmp_path / "scaling.json"
    words = ["--axes", "tokens", "prompts", "--sides", "2", "3", "--prompts", "2", "--repeats", "1", "--threads"]
    scaling.main([*words, str(torch.get_num_threads()), "--out", str(out)])
    axes = json.loads(out.read_text())["axes"]
    assert {axis: [row["number"] for row in found["rows"]] for axis, found in axes.items()} == {
        "tokens": [4, 9], "prompts": [2]
    }  # fmt: skip
    for axis in axes.values():
        assert axis["exponents"].keys() == set(scaling.PHASES)
        for row in axis["rows"]:
            assert row["seconds"]["step"] > sum(row["seconds"][name] for name in ("rollout", "backward")) > 0
    assert "expected" in capsys.readouterr().out


def test_a_worker_leaves_the_metrics_that_are_read(grid, tmp_path):
    scaling.main_worker(str(grid), str(tmp_path / "run"), "16", "2")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "step_time" in row]
    assert len(steps) == 2 and all(row["seconds/rollout"] > 0 and row["seconds/update"] > 0 for row in steps)


def test_the_limits_are_those_of_the_published_sizes():
    """Numbers in limits.md that depend on the model, from its configuration."""
    text = (FOLDER / "limits.md").read_text(encoding="utf-8")
    sizes = policy_sizes("deepseek-ai/Janus-Pro-7B")
    streamed = 2 * (sizes.layers_matmul + sizes.head_matmul + sizes.code_matmul)
    cache = 2 * 2 * sizes.text.num_hidden_layers * sizes.text.num_key_value_heads * sizes.head_dim
    assert f"{streamed / 1e9:.2f} GB" in text and f"{cache:,} B" in text
    for bandwidth in (3.35, 4.8):
        assert f"{streamed / bandwidth / 1e9:.2f} ms" in text
