"""What the code base promises about itself: who imports whom, sizes, and what an import costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stage_grpo.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "stage_grpo"
MODULES = sorted(SOURCE.rglob("*.py"))

LAYERS = [
    ["types", "command_line", "checksums", "devices", "onednn_linear", "option_checks", "plug_ins", "versions"],
    ["objective", "similarity", "entropy", "weighting", "presets"],
    ["checkpoints", "download", "prompt_sets", "run_checkpoints"],
    ["policy", "shards", "averaging"],
    ["sampling", "rollout", "generation", "merge"],
    ["guard_signals", "guard_rules", "guard_options", "micro_batches", "config_parsing"],
    ["config", "heldout_plan", "heldout_record", "preflight", "graceful_stop", "resuming", "resumable"],
    ["guard_record", "guard_finite", "guard", "guarded"],
    ["planning"],
    ["gathering", "trl_seams", "micro_batched", "trainer", "heldout", "training", "demo"],
    ["launch", "supervise"],
    ["cli"],
]
"""Each line may import the lines above it and its own."""

ON_IMAGES = ["rewards", "weights", "scoring", "detectors", "images", "evaluation", "comparison", "pages"]
ON_IMAGES += ["benchmarks", "benchmark_rows"]
"""These work on finished images, whatever made them, so they never reach a policy."""
MODEL_SIDE = {part for layer in LAYERS[3:] for part in layer}


def part_of(path):
    """First name below the package: ``policy/janus.py`` belongs to ``policy``."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_files(path):
    """Files of the package that a file imports, also inside functions and for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write absolute imports, so that this test can read them"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {file for name in names for file in files_of(name)}
    return found - {path}


def files_of(name):
    """Every file that importing a dotted name runs: packages on the way, and the module itself."""
    parts = name.split(".")
    if parts[0] != "stage_grpo":
        return set()
    stems = [ROOT.joinpath("src", *parts[: i + 1]) for i in range(len(parts))]
    return {file for stem in stems for file in (stem / "__init__.py", stem.with_suffix(".py")) if file in MODULES}


def reached_from(part):
    """Parts that a part imports, directly or through others, each with the chain of files that leads there."""
    chains = {path: [path] for path in MODULES if part_of(path) == part}
    assert chains, f"there is no {part!r} any more; correct the lists in this test"
    queue = list(chains)
    for path in queue:
        for file in imported_files(path) - chains.keys():
            chains[file] = [*chains[path], file]
            queue.append(file)
    return {
        part_of(file): " -> ".join(str(p.relative_to(SOURCE)) for p in chain)
        for file, chain in chains.items()
        if part_of(file) != part
    }


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_lower_layers_never_reach_higher_ones():
    higher = {part for layer in LAYERS for part in layer}
    for layer in LAYERS:
        higher -= set(layer)
        for part in layer:
            wrong = {name: chain for name, chain in reached_from(part).items() if name in higher}
            assert not wrong, f"{part} imports a higher layer: {wrong}"


@pytest.mark.parametrize("part", ON_IMAGES)
def test_scoring_never_reaches_the_model(part):
    wrong = {name: chain for name, chain in reached_from(part).items() if name in MODEL_SIDE}
    assert not wrong, f"{part} works on finished images, but imports {wrong}"


def test_this_test_sees_imports():
    assert {"policy", "rollout", "objective", "types", "rewards"} <= reached_from("trainer").keys()
    assert reached_from("cli")["shapes"].startswith("cli.py -> ")


def test_importing_the_maths_costs_torch_alone():
    program = (
        "import sys, stage_grpo, stage_grpo.objective, stage_grpo.similarity, stage_grpo.entropy\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"transformers", "trl", "datasets", "peft", "accelerate", "matplotlib"}


def test_files_fit_in_300_lines_and_functions_in_50():
    long_files = {str(p.relative_to(ROOT)): n for p in MODULES if (n := len(p.read_text().splitlines())) > 300}
    assert not long_files
    long_functions = {
        f"{path.relative_to(ROOT)}:{node.name}": length
        for path in MODULES
        for node in functions(path)
        if (length := node.end_lineno - node.lineno + 1) > 50
    }
    assert not long_functions


def test_only_the_command_line_prints():
    for path in MODULES:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
        assert not names & {"eval", "exec", "breakpoint"}, path
        assert "print" not in names or path.name == "cli.py", path


def test_no_file_knows_a_folder_of_somebodys_machine():
    machine_path = re.compile(r"(?<![\w.])/(?:home|root|tmp|Users|mnt|data|workspace|work|scratch)/\w")
    kinds = {".py", ".yaml", ".md", ".txt", ".toml", ".sh", ".json", ".j2"}
    folders = ["src", "tests", "configs", "scripts", "infer", "eval", "docs", "benchmarks", ".ci"]
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in kinds or p.name == "run"]
    files += [p for p in ROOT.iterdir() if p.is_file() and (p.suffix in kinds or p.name == "Makefile")]
    assert len(files) > 50
    found = [
        f"{p.relative_to(ROOT)}: {hit.group()}" for p in files for hit in [machine_path.search(p.read_text())] if hit
    ]
    assert not found


def test_assets_are_small_enough_to_clone():
    sizes = {str(p.relative_to(ROOT)): p.stat().st_size for p in (ROOT / "assets").rglob("*") if p.is_file()}
    assert sizes and sum(sizes.values()) < 15e6, sizes
    assert all(size < 12e6 for size in sizes.values()), sizes


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0 and err == ""
    assert f"usage: stage {name}" in out and len(out.splitlines()) > 4


def test_the_bare_command_lists_all_commands(capsys):
    main([])
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in COMMANDS)
