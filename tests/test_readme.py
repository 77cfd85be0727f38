"""The README is true: its Python runs, its commands parse, its links lead somewhere."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

from stage_grpo.config import parse_config
from stage_grpo.launch import prepare_launch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def test_python_examples_train_and_draw(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    example, drawing = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    # The example as printed, but elsewhere and for one step.
    shorter = example.replace("outputs/redness", str(tmp_path / "run")).replace("max_steps=20", "max_steps=1")
    assert shorter != example
    exec(compile(shorter, "README.md", "exec"), {})
    assert "redness" in (tmp_path / "run" / "metrics.jsonl").read_text()
    names = {}
    exec(compile(drawing, "README.md", "exec"), names)
    assert [image.size for image in names["images"]] == [(48, 48)] * 4


def test_train_command_of_the_readme_parses(monkeypatch):
    monkeypatch.chdir(ROOT)
    (line,) = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("stage train")]
    config = parse_config("stage train", shlex.split(line)[2:])
    assert config.max_steps == 50 and config.learning_rate == 1e-4 and config.rewards == ["shapes"]


def test_launch_commands_of_the_readme_are_dry_and_come_after_the_environment(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    launches = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("stage launch")]
    plans = [prepare_launch("stage launch", words) for words in launches]
    assert [(ready.is_dry, ready.plan.setting.num_gpus) for ready in plans] == [(True, 8), (True, 1)]
    activated = next(i for i, line in enumerate(lines) if line.startswith(". .venv/bin/activate"))
    assert activated < min(i for i, line in enumerate(lines) if line.startswith(("stage ", "pip ")))


RECIPES = [path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ("accelerate", "ablation")]


@pytest.mark.parametrize("recipe", sorted(RECIPES), ids=lambda path: path.stem)
def test_every_shipped_recipe_parses(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parse_config("stage train", [str(recipe)])
    given = yaml.safe_load(recipe.read_text())
    assert config.output_dir == given["output_dir"] and config.beta == given["beta"]


def test_pinned_requirements_are_those_of_the_package():
    tree = ast.parse((ROOT / "setup.py").read_text())
    lists = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    needed, pinned = ast.literal_eval(lists["CORE"]), (ROOT / "requirements.txt").read_text().splitlines()
    names = [{re.split("[<=>]", line)[0].lower() for line in lines if line[0] != "#"} for lines in (needed, pinned)]
    assert names[0] == names[1]


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if not target.startswith("http")]
    assert len(local) > 3
    missing = [target for target in local if not (ROOT / target).exists()]
    assert not missing


def test_tree_in_the_readme_names_real_places():
    (tree,) = [block for block in blocks("") if block.startswith("src/stage_grpo/")]
    package = [name for line in tree.splitlines() if line.startswith("  ") for name in line.split("  ")[1].split()]
    assert len(package) > 15
    assert not [name for name in package if not (ROOT / "src/stage_grpo" / name).exists()]


def test_readme_is_short():
    assert len(README.splitlines()) < 200
