"""The command line: wrong input ends in one line and exit code 2 with nothing written; right input does its work."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from stage_grpo import demo, training
from stage_grpo.cli import main
from stage_grpo.evaluation.scores import Scores
from stage_grpo.training import TrainingResult

RECIPE = {
    "output_dir": "out",
    "train_prompts": "prompts.jsonl",
    "rewards": ["shapes"],
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_steps": 2,
    "guidance_scale": 3.0,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "sample_steps": 1,
}

WRONG_KEYS = {
    "unknown key": ({"learning_rat": 1e-5}, "'learning_rat'", "did you mean learning_rate?"),
    "unknown preset": ({"preset": "papr"}, "preset='papr'", "use one of paper, released, grpo"),
    "unknown reward": ({"rewards": ["shape"]}, "unknown reward 'shape'", "known are"),
    "reward of a missing module": ({"rewards": ["absent:f"]}, "'absent:f'", "write module.path:name"),
    "unknown reward option": ({"reward_options": {"shapes": {"strickt": 1}}}, "'strickt'", "known are strict"),
    "wrong reward option": (
        {"reward_options": {"shapes": {"strict": "x"}}},
        "'shapes' rejects its options strict",
        "strict",
    ),
    "option of another reward": ({"reward_options": {"hps": {}}}, "'hps'", "rewards=['shapes']"),
    "weights and rewards": ({"reward_weights": [1.0, 2.0]}, "reward_weights=[1.0, 2.0]", "one weight for each"),
    "group against batch": ({"num_generations": 3}, "num_generations=3", "per_device_train_batch_size=8"),
    "group of one": ({"num_generations": 1}, "num_generations=1", "at least 2"),
    "no steps": ({"max_steps": 0}, "max_steps=0", "at least 1"),
    "entropy reward without KL": ({"beta": 0}, "entropy_reward_weight=0.4", "set beta above 0"),
    "negative beta": ({"beta": -0.1}, "beta=-0.1", "not negative"),
    "word for a number": ({"learning_rate": "fast"}, "'fast'", "learning_rate"),
    "list for a number": ({"learning_rate": [1]}, "learning_rate=[1]", "must be a number"),
    "unknown loss": ({"loss_type": "reinforce"}, "loss_type='reinforce'", "use one of grpo"),
    "negative temperature": ({"temperature": -1.0}, "temperature=-1.0", "must be above 0"),
    "guidance below 1": ({"guidance_scale": 0.5}, "guidance_scale=0.5", "at least 1"),
    "text engine": ({"use_vllm": True}, "use_vllm=True", "own rollout"),
    "missing prompts": ({"train_prompts": "absent.txt"}, "train_prompts='absent.txt'", "give a .txt, .jsonl or .csv"),
    "broken prompts": ({"train_prompts": "broken.jsonl"}, "broken.jsonl, line 2", "write one JSON object a line"),
    "too few prompts": ({"train_prompts": "one.txt"}, "holds 1 prompts", "add prompts"),
    "reward without its metadata": ({"train_prompts": "prompts.txt"}, "'a photo of a circle'", "name at least one"),
    "evaluation that never comes": ({"eval_prompts": "prompts.txt"}, "does nothing with eval_strategy='no'", "epoch"),
    "evaluation of nothing": ({"eval_strategy": "steps"}, "eval_prompts is not set", "set it"),
    "missing checkpoint": ({"model": "./absent"}, "model='absent'", "give a transformers-format checkpoint"),
    "torn weights": ({"model": "./torn"}, "the weights of model='torn' are torn", "fetch or save them again"),
    "wrong resolution": ({"image_size": 384}, "image_size=384", "48 px (36 tokens); use another checkpoint"),
    "output is a file": ({"output_dir": "one.txt"}, "output_dir='one.txt'", "name a folder"),
    "resuming by another name": ({"resume_from_checkpoint": "x"}, "resume_from_checkpoint='x'", "set resume: auto"),
    "no reference to replace": ({"ref_model": "x", "use_peft": True}, "ref_model='x'", "train without adapters"),
    "two prompt files": ({"train_prompts": ["a", "b"]}, "train_prompts=['a', 'b']", "must be text or null"),
    "a float as count": ({"num_generations": 4.0}, "num_generations=4.0", "must be a whole number or null"),
    "text among numbers": ({"kl_weight_clip": ["0", "1"]}, "kl_weight_clip=['0', '1']", "a list of numbers or null"),
    "one number as list": ({"reward_weights": 1.0}, "reward_weights=1.0", "a list of numbers or null"),
    "mapping as list": ({"rewards": {"shapes": 1}}, "rewards={'shapes': 1}", "a list of names or null"),
    "yes as a number": ({"max_steps": True}, "max_steps=True", "must be a whole number"),
    "rank": ({"lora_r": -3}, "lora_r=-3", "at least 1"),
    "average of nothing": ({"ema_decay": 1.0}, "ema_decay=1.0", "between 0 and 1"),
}

WRONG_WORDS = {
    "bad YAML": ("train bad.yaml", "'bad.yaml' is not valid YAML", "correct it"),
    "YAML list": ("train list.yaml", "['a', 'b']", "write one 'key: value' a line"),
    "no YAML": ("train absent.yaml", "'absent.yaml' cannot be read", "give a YAML file"),
    "nothing at all": ("train", "model is not set", "--model"),
    "YAML after flags": ("train --beta 0.1 run.yaml", "'run.yaml' belongs to no key", "the YAML file first"),
    "YAML as a flag": ("train --config=list.yaml", "['a', 'b']", "write one 'key: value' a line"),
    "unknown flag": ("train run.yaml --learnin_rate 1", "'learnin_rate'", "did you mean learning_rate?"),
    "cut flag": ("train run.yaml --learning_rat 1", "'learning_rat'", "did you mean learning_rate?"),
    "temperature": ("generate --model M --out out --prompt a --temperature -1", "temperature=-1.0", "must be above 0"),
    "not a number": ("generate --model M --out out --prompt a --seed x", "'x'", "--seed"),
    "no prompt": ("generate --model M --out out", "--prompt --prompts", "required"),
    "blank prompt": ("generate --model M --out out --prompts blank.csv", "blank.csv, line 2", "fill the column"),
    "kind of file": ("generate --model M --out out --prompts run.yaml", "'.yaml'", "use .txt, .jsonl or .csv"),
    "full folder": ("generate --model M --out full --prompt a", "out='full'", "choose another folder"),
    "file as folder": ("generate --model M --out one.txt --prompt a", "out='one.txt'", "name a folder"),
    "no images": ("generate --model M --out out --prompt a --num-images 0", "num_images=0", "at least 1"),
    "template": ("generate --model M --out out --prompt a --prompt-template x", "prompt_template='x'", "use one of"),
    "benchmark": ("evaluate --benchmark imagenet --images full", "'imagenet'", "known are shapes"),
    "images": ("evaluate --benchmark shapes --images absent", "absent is not a folder", "generate images first"),
    "empty images": ("evaluate --benchmark shapes --images full", "full holds no prompt folders", "expected"),
    "run folder": ("report full", "full holds no run.json", "give a training run's folder"),
    "split": ("shapes prompts --split test --out o.jsonl", "'test'", "choose from"),
    "shares": ("shapes prompts --split train --ratio 1:x --out o.jsonl", "1:x", "six numbers"),
    "demo": ("demo --minutes -1", "minutes=-1.0", "must be above 0"),
}


@pytest.fixture
def workplace(checkpoint, tmp_path, monkeypatch):
    """A folder with a good recipe and all that the wrong ones name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a photo of a circle\na photo of two rings\na photo of a cross\n")
    rows = [{"prompt": f"a photo of a {name}", "include": [{"class": name, "count": 1}]} for name in ("ring", "cross")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "one.txt").write_text("a photo of a circle\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a photo of a ring"}\n{"prompt": \n')
    (tmp_path / "blank.csv").write_text("prompt,tag\n ,x\n")
    (tmp_path / "bad.yaml").write_text("model: [a\nb: c: d\n")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    for folder in ("full", "torn"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    for name in ("config.json", "model.safetensors"):
        content = (tmp_path / checkpoint / name).read_bytes()
        (tmp_path / "torn" / name).write_bytes(content[: len(content) // 2] if name[0] == "m" else content)
    write_recipe(tmp_path, model=checkpoint)
    return tmp_path


def write_recipe(folder, **changes):
    (folder / "run.yaml").write_text(yaml.safe_dump({**RECIPE, **changes}))


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def check_refusal(err, command, named, remedy):
    assert len(err.splitlines()) == 1, err
    assert err.startswith(f"stage {command}: error: ")
    assert named in err and remedy in err, err
    assert "Traceback" not in err


def check_refused(words, named, remedy, capsys, folder):
    before = contents(folder)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    command = " ".join(words[:2]) if words[0] == "shapes" else words[0]
    check_refusal(capsys.readouterr().err, command, named, remedy)
    assert contents(folder) == before


@pytest.mark.parametrize("case", WRONG_KEYS)
def test_wrong_values_in_a_recipe_are_refused(case, workplace, checkpoint, capsys):
    changes, named, remedy = WRONG_KEYS[case]
    write_recipe(workplace, **{"model": checkpoint, **changes})
    check_refused(["train", "run.yaml"], named, remedy, capsys, workplace)


@pytest.mark.parametrize("case", WRONG_WORDS)
def test_wrong_words_are_refused(case, workplace, checkpoint, capsys):
    line, named, remedy = WRONG_WORDS[case]
    words = [checkpoint if word == "M" else word for word in line.split()]
    check_refused(words, named, remedy, capsys, workplace)


@pytest.mark.parametrize(
    ("line", "named", "remedy"),
    [
        ("generate --model . --out out --prompt a --temperature -1", "temperature=-1.0", "must be above 0"),
        ("evaluate --benchmark imagenet --images full", "'imagenet'", "known are"),
    ],
)
def test_refusals_reach_the_shell(line, named, remedy, workplace):
    """The same in a process of its own, where a library might write to stderr as well."""
    before = contents(workplace)
    done = subprocess.run([sys.executable, "-m", "stage_grpo.cli", *line.split()], capture_output=True, text=True)
    assert done.returncode == 2
    check_refusal(done.stderr, line.split()[0], named, remedy)
    assert contents(workplace) == before


def test_unknown_commands_are_refused_beside_the_list(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and err == "stage: error: unknown command 'trian'\n"
    assert "  train " in out


def test_a_first_word_lists_its_commands(capsys):
    main(["data", "--help"])
    out, err = capsys.readouterr()
    assert err == "" and "  data fetch " in out and "  data list " in out and "  train" not in out
    with pytest.raises(SystemExit) as ended:
        main(["weights", "fetch"])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and "  weights get " in out
    assert err == "stage: error: 'weights fetch' is no command; 'stage weights --help' lists them\n"


def test_a_stopped_demo_says_so_and_draws_with_the_recipes_template(workplace, monkeypatch, capsys):
    templates = []
    for name in ("load_policy", "load_tokenizer"):
        monkeypatch.setattr(demo, name, lambda source: None)
    monkeypatch.setattr(demo, "generate", lambda *args, prompt_template: templates.append(prompt_template))
    monkeypatch.setattr(demo, "evaluate", lambda *args: Mock(spec=Scores))
    monkeypatch.setattr(demo, "train", lambda *args: TrainingResult(workplace / "out", "SIGINT", 3, None, True))
    write_recipe(workplace, prompt_template="t2i_r1", model="absent")
    with pytest.raises(SystemExit):
        main(["demo", "--recipe", "run.yaml", "--prompts", "prompts.txt"])
    assert "SIGINT ended the training after step 3" in capsys.readouterr().err and templates == ["t2i_r1"]


@pytest.mark.parametrize(("anew", "told"), [(None, "--resume auto"), ("begin a new run", "\n  begin a new run\n")])
def test_a_stopped_run_prints_what_can_be_done_next(anew, told, workplace, monkeypatch, capsys):
    result = TrainingResult(Path("out"), "SIGTERM", 3, anew, True)
    monkeypatch.setattr(training, "train", lambda config: result)
    assert told in run(capsys, "train run.yaml")


def test_a_new_run_begins_from_a_checkpoint_as_it_is_told(workplace, checkpoint, capsys):
    save = "--save_strategy steps --save_steps 1 --save_only_model true"
    run(capsys, f"train run.yaml --max_steps 1 --learning_rate 0.1 --weight_decay 0.5 {save}")
    with pytest.raises(SystemExit):
        main(["train", "run.yaml"])
    _, words = capsys.readouterr().err.strip().split("begin a new run with ")
    assert words == f"--model out/checkpoint-1 --ref_model {checkpoint} --resume never"
    run(capsys, f"train run.yaml --max_steps 1 --output_dir new {words}")
    row = json.loads((workplace / "new" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["kl"] > 1e-4  # of the policy that was trained, against the one that it was trained from
    assert (workplace / "new" / "processor_config.json").is_file()


def run(capsys, line, *more):
    main([*line.split(), *more])
    return capsys.readouterr().out


def test_from_a_recipe_to_a_report(workplace, checkpoint, capsys):
    """Train two steps, draw images of held-out prompts, score them, report: what a newcomer does."""
    assert "saved out" in run(capsys, "train run.yaml --learning_rate 0.001 --disable_tqdm true")
    config = json.loads((workplace / "out" / "run.json").read_text())["config"]
    assert (config["learning_rate"], config["num_generations"], config["preset"]) == (0.001, 4, "paper")
    rows = [json.loads(line) for line in (workplace / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows[:2]] == [1, 2] and rows[0]["kl"] == 0.0

    assert "wrote 12 prompts" in run(capsys, "shapes prompts --split heldout --num 12 --out heldout.jsonl")
    for out, batch in (("images", "12"), ("again", "5")):
        run(capsys, "generate --model out --prompts heldout.jsonl --out", out, "--batch-size", batch)
    images = sorted((workplace / "images").glob("*/samples/*.png"))
    assert len(images) == 12 and len({path.read_bytes() for path in images}) > 1
    for path in images:
        assert path.read_bytes() == (workplace / "again" / path.relative_to(workplace / "images")).read_bytes()

    table = run(capsys, "evaluate --benchmark shapes --images images --out scores.json")
    scores = json.loads((workplace / "scores.json").read_text())
    assert scores["num_images"] == 12
    # All six categories with two images each, and their mean: what the table's column of counts says.
    assert [line.split()[-1] for line in table.splitlines()[1:7]] == ["2"] * 6
    graded = scores["scores"]["graded"]
    mean = sum(graded[name] for name in scores["columns"]) / 6
    assert graded["overall"] == pytest.approx(mean, abs=1e-6)
    assert "report.html" in run(capsys, "report out")
    html = (workplace / "out" / "report.html").read_text()
    assert "a photo of" in html and "<svg" in html and "http://" not in html.replace("http://www.w3.org", "")
