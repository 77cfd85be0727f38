"""Functions of one's own by name: found in the current folder by every command, without hiding what is installed."""

import sys

import pytest
from PIL import Image

from stage_grpo.cli import main
from stage_grpo.plug_ins import load_target
from stage_grpo.weighting.registry import build_weighting

MODULE = """
def brightness(images, prompts, metadata):
    return [image.convert("L").getpixel((0, 0)) / 255 for image in images]


def plain(codes, advantages, entropies, step):
    return entropies * 0 + 1
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a module of its own; as under the command ``stage`` it is not on the path."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    yield name
    sys.modules.pop(name, None)


def test_a_command_finds_a_reward_in_the_current_folder(here, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    Image.new("RGB", (8, 8), (255, 255, 255)).save(tmp_path / "set" / "0.png")
    (tmp_path / "prompts.txt").write_text("a cloud\n")
    words = ["--images", "set", "--prompts", "prompts.txt", "--out", "scores.jsonl"]
    main(["score", "--reward", f"{here}:brightness", *words])
    assert '"brightness": 1.0' in (tmp_path / "scores.jsonl").read_text()


def test_a_weighting_is_found_and_the_folder_comes_last(here, tmp_path):
    before = list(sys.path)
    build_weighting(f"{here}:plain")
    assert sys.path == [*before, str(tmp_path)]
    build_weighting(f"{here}:plain")
    assert sys.path == [*before, str(tmp_path)]


def test_installed_modules_go_before_those_of_the_folder(here, tmp_path):
    (tmp_path / "colorsys.py").write_text("rgb_to_hsv = None\n")
    before = list(sys.path)
    assert callable(load_target("colorsys:rgb_to_hsv", "it"))
    assert sys.path == before


def test_what_is_nowhere_leaves_the_path_alone(here, tmp_path):
    before = list(sys.path)
    with pytest.raises(
        ValueError, match=r"'x' cannot be imported .No module named 'absent_module'.; write module.path"
    ):
        load_target("absent_module:f", "'x'")
    assert sys.path == before
