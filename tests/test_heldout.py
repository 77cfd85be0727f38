"""Held-out evaluation while training: training does not notice, the score is the commands' own, the best is kept."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stage_grpo import heldout
from stage_grpo.benchmarks import BENCHMARKS
from stage_grpo.config import StageConfig
from stage_grpo.data import load_rows
from stage_grpo.evaluation.evaluate import evaluate
from stage_grpo.generation.generate import generate
from stage_grpo.guard_signals import History
from stage_grpo.heldout import HeldoutEvaluation, untouched_random_state
from stage_grpo.heldout_plan import HeldoutPlan, check_heldout, lacking_for, plan_heldout, warn_if_trained_on
from stage_grpo.heldout_record import HeldoutFolder, HeldoutRecord, read_records
from stage_grpo.policy import load_policy, load_tokenizer
from stage_grpo.preflight import Demand, missing
from stage_grpo.run_checkpoints import defect
from stage_grpo.sampling import Sampling
from stage_grpo.training import train
from stage_grpo.types import PromptRow
from test_resume import numbers

ROOT = Path(__file__).parents[1]
TINY = ROOT / "assets" / "tiny-janus-shapes"
STEPS = [0, 2, 3]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """One held-out prompt of each category."""
    path = tmp_path_factory.mktemp("prompts") / "heldout.jsonl"
    lines = (ROOT / "assets" / "shapes" / "heldout.jsonl").read_text().splitlines()
    path.write_text("\n".join(lines[::100]))
    assert [json.loads(line)["tag"] for line in lines[::100]] == list(BENCHMARKS["shapes"].columns)
    return path


def config(folder, prompts=None, **changes):
    values = {
        "model": str(TINY),
        "train_prompts": str(ROOT / "assets" / "shapes" / "train.jsonl"),
        "rewards": ["shapes"],
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_steps": 3,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "guidance_scale": 1.0,
        "gradient_checkpointing": False,
        "save_strategy": "steps",
        "save_steps": 1,
        "sample_steps": 0,
        "disable_tqdm": True,
        "bf16": False,
    }
    if prompts is not None:
        values |= {"heldout_benchmark": "shapes", "heldout_prompts": str(prompts), "heldout_steps": 2}
        values |= {"heldout_measure": "graded", "heldout_num_images": 2}
    return StageConfig(str(folder), **{**values, **changes})


@pytest.fixture(scope="module")
def straight(prompts, tmp_path_factory):
    """A run of three steps, tested at 0, 2 and at its end."""
    folder = tmp_path_factory.mktemp("straight")
    train(config(folder, prompts))
    return folder


def comparable(folder):
    return [dataclasses.replace(record, seconds=0) for record in read_records(folder)]


def pixels(folder):
    files = sorted(path for path in folder.rglob("*.png") if path.parent.name == "samples")
    return {path.relative_to(folder): Image.open(path).tobytes() for path in files}


def test_training_does_not_notice(straight, tmp_path):
    train(config(tmp_path))
    without, tested = ([row for row in numbers(folder) if "loss" in row] for folder in (tmp_path, straight))
    assert tested == without and [row["step"] for row in tested] == [1, 2, 3]
    for step in (1, 2, 3):
        ours, theirs = (load_file(f / f"checkpoint-{step}" / "model.safetensors") for f in (straight, tmp_path))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_the_last_score_is_that_of_the_two_commands(straight, prompts, tmp_path):
    policy = load_policy(str(straight))
    generate(policy, load_tokenizer(policy), load_rows(prompts), tmp_path, Sampling(1.0), num_images=2)
    scores = evaluate("shapes", tmp_path, measures=["graded", "strict"], diversity_space="codes")
    last = read_records(straight)[-1]
    assert (last.step, last.scores, last.diversity) == (3, scores.scores, scores.diversity)
    assert last.score == scores.scores["graded"]["heldout"] != scores.scores["graded"]["overall"]
    assert last.ci95 == scores.ci95["graded"]["heldout"] and last.num_images == 12
    assert pixels(straight / "heldout" / "step-000003" / "images") == pixels(tmp_path) != {}


def test_every_score_is_logged_and_recorded(straight):
    records = read_records(straight)
    assert [record.step for record in records] == STEPS
    assert len({record.score for record in records}) > 1
    logged = {row["step"]: row for row in numbers(straight) if "heldout/score" in row}
    assert list(logged) == STEPS
    for record in records:
        row = logged[record.step]
        assert row["heldout/score"] == row["heldout/graded/heldout"] == record.score
        assert row["heldout/strict/counting"] == record.scores["strict"]["counting"]
        assert row["heldout/diversity/unique_share"] == record.diversity["unique_share"]
        assert "reward" not in row, "the metrics of a training step were taken along"
        saved = json.loads((straight / "heldout" / f"step-{record.step:06d}" / "scores.json").read_text())
        assert saved["scores"] == record.scores


def test_the_best_policy_is_kept_and_the_images_of_first_best_and_last(straight):
    records = read_records(straight)
    best = max(records, key=lambda record: record.score)
    folder = straight / "best"
    assert HeldoutRecord(**json.loads((folder / "best.json").read_text())) == best
    assert defect(folder) is None and not (straight / ".partial").exists()
    source = straight / f"checkpoint-{best.step}" if best.step else TINY
    kept, there = load_file(folder / "model.safetensors"), load_file(source / "model.safetensors")
    assert all(torch.equal(kept[name], there[name]) for name in kept.keys() & there.keys()) and len(kept) > 20
    load_tokenizer(load_policy(str(folder)))
    with_images = [step for step in STEPS if (straight / "heldout" / f"step-{step:06d}" / "images").is_dir()]
    assert with_images == sorted({0, best.step, 3})


@pytest.mark.parametrize(("killed", "scored"), [("in the second test", [2, 3]), ("after it", [3])])
def test_a_resumed_run_scores_what_is_not_scored(straight, prompts, tmp_path, monkeypatch, killed, scored):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoint-3")
    for name in ("model.safetensors", "config.json"):
        (run / name).unlink()
    known = 1 if scored == [2, 3] else 2
    lines = (run / "heldout.jsonl").read_text().splitlines()
    (run / "heldout.jsonl").write_text("\n".join([*lines[:known], '{"step": 2, "sco']))
    if known == 1:  # images of that moment, one of them half written, and one of another policy
        images = run / "heldout" / "step-000002" / "images"
        shutil.copytree(run / "heldout" / "step-000000" / "images", images, dirs_exist_ok=True)
        next(images.rglob("00000.png")).write_bytes(b"\x89PNG")
    steps, score = [], heldout.score_policy
    monkeypatch.setattr(heldout, "score_policy", lambda *args: steps.append(args[-1]) or score(*args))
    train(config(run, prompts))
    assert steps == scored
    assert comparable(run) == comparable(straight)
    best = json.loads((run / "best" / "best.json").read_text())
    assert best["score"] == max(record.score for record in read_records(straight))
    assert [row for row in numbers(run) if "loss" in row] == [row for row in numbers(straight) if "loss" in row]
    states = [json.loads((f / "checkpoint-3" / "guard_state.json").read_text()) for f in (run, straight)]
    assert states[0] == states[1]


def test_adapters_and_averages_are_kept_as_they_were_scored(prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(HeldoutFolder, "is_best", lambda self, record: True)
    changes = {"use_peft": True, "lora_r": 4, "ema_decay": 0.9, "max_steps": 1, "save_strategy": "no"}
    train(config(tmp_path, prompts, **changes))
    assert [record.step for record in read_records(tmp_path)] == [0, 1]
    best, average, last = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "best", tmp_path / "ema", tmp_path)
    )
    assert best.keys() == average.keys() and all(torch.equal(best[name], average[name]) for name in best)
    assert not all(torch.equal(best[name], last[name]) for name in best)
    assert not (tmp_path / "best" / "model.safetensors").exists()


# --- what is scored --------------------------------------------------------------------------------------


def plan(**changes):
    rows = tuple(PromptRow(f"a photo of a {tag}", {"tag": tag}) for tag in BENCHMARKS["shapes"].columns)
    return dataclasses.replace(HeldoutPlan(BENCHMARKS["shapes"], "strict", rows, Sampling(1.0)), **changes)


def test_only_scores_of_the_same_plan_compare():
    other = {
        "measure": "graded",
        "rows": plan().rows[1:],
        "sampling": Sampling(2.0),
        "num_images": 2,
        "prompt_template": "t2i_r1",
        "reward_options": {"shapes": {"strict": True}},
    }
    prints = {plan(**{name: value}).fingerprint for name, value in other.items()}
    assert len(prints) == len(other) and plan().fingerprint not in prints
    assert plan().fingerprint == plan(prompts="elsewhere.jsonl").fingerprint


def test_what_the_score_is():
    assert plan().line == "heldout" and plan().measures == ["strict", "graded"]
    geneval = plan(benchmark=BENCHMARKS["geneval"])
    assert geneval.line == "overall" and geneval.measures == ["strict", "graded"]
    hps = plan(benchmark=BENCHMARKS["hps"], measure="pickscore")
    assert hps.measures == ["pickscore"] and [scorer.reward for scorer in hps.scorers] == ["pickscore"]


REFUSED = {
    "no benchmark": ({"heldout_benchmark": None}, r"heldout_prompts=.* does nothing without heldout_benchmark"),
    "unknown benchmark": ({"heldout_benchmark": "genval"}, "unknown benchmark 'genval'; known are shapes, geneval"),
    "no overall": (
        {"heldout_benchmark": "t2i_compbench", "heldout_measure": "value"},
        "has no overall score to follow",
    ),
    "unknown measure": ({"heldout_measure": "hps"}, "heldout_measure='hps' is unknown to 'shapes'; use one of strict"),
    "no steps": ({"heldout_steps": 0}, "heldout_steps=0 must be a whole number of at least 1"),
    "half steps": ({"heldout_steps": 2.5}, "heldout_steps=2.5 must be a whole number"),
    "no images": ({"heldout_num_images": 0}, "heldout_num_images=0 must be a whole number of at least 1"),
    "guidance in words": ({"heldout_guidance_scale": "one"}, "heldout_guidance_scale='one' must be a number"),
    "guidance": ({"heldout_guidance_scale": -1.0}, "guidance_scale"),
    "options": ({"heldout_reward_options": {"ocr": {}}}, "names 'ocr', but 'graded' of 'shapes' is scored by shapes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_work_are_refused_before_anything_is_read(tmp_path, name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        config(tmp_path, "nowhere.jsonl", **changes)


def test_prompts_that_are_trained_on_are_refused(tmp_path, prompts):
    args = config(tmp_path, prompts)
    rows = load_rows(prompts)
    assert [row.metadata["tag"] for row in rows[:2]] == ["single_object", "two_object"]
    # Both sides have all single objects, so they are no part of the score.
    assert plan_heldout(args, rows[:1]).rows[0].prompt == rows[0].prompt
    shouted = PromptRow(f" {rows[1].prompt.upper()} ", {})
    with pytest.raises(
        ValueError, match=rf"1 of the 4 held-out prompts are trained on, the first is '{rows[1].prompt}'"
    ):
        plan_heldout(args, [*rows[:1], shouted])


def test_a_mean_over_categories_needs_them_all(tmp_path, prompts):
    lines = prompts.read_text().splitlines()
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(lines[1:4]))
    with pytest.raises(ValueError, match="none of category position, color_attr"):
        plan_heldout(config(tmp_path, few))
    (short := tmp_path / "short.txt").write_text('a sign that says "Open"\n')
    with pytest.raises(ValueError, match="none of category 6 to 10, 11 to 20, over 20"):
        plan_heldout(config(tmp_path, short, heldout_benchmark="ocr", heldout_measure=None))
    few.write_text("\n".join([lines[1], *lines[3:]]))  # without those that are not counted
    assert len(plan_heldout(config(tmp_path, few)).rows) == 4


def test_following_the_training_reward_is_told(caplog):
    warn_if_trained_on(plan(), ["shapes"])  # right or wrong by the rule, where training has the graded reward
    warn_if_trained_on(plan(measure="graded"), ["geneval"])
    assert caplog.text == ""
    warn_if_trained_on(plan(measure="graded"), ["ocr", "shapes"])
    assert "heldout_measure graded is the score of shapes, which is also trained on" in caplog.text


def test_preflight_names_what_the_test_lacks(tmp_path, monkeypatch):
    for name in ("STAGE_DATA", "STAGE_WEIGHTS"):
        monkeypatch.setenv(name, str(tmp_path / "empty"))
    args = config(tmp_path, heldout_benchmark="drawbench")
    found = missing(args, Demand(0, 0, False, False), 0)
    assert [one.remedy for one in found if "drawbench" in one.what] == ["stage data fetch drawbench"]
    drawbench = plan(benchmark=BENCHMARKS["drawbench"], measure="image_reward")
    assert [remedy for _, remedy in lacking_for(drawbench)] == ["stage weights get image-reward"]
    with pytest.raises(ValueError, match=r"heldout_benchmark='drawbench': .* stage weights get image-reward"):
        check_heldout(drawbench)


# --- which policy is the best ----------------------------------------------------------------------------


def record(step, score, **changes):
    given = HeldoutRecord(step, score, [0.0, 1.0], "strict", "heldout", {}, {}, 8, 0, 1.0, "same plan")
    return dataclasses.replace(given, **changes)


def kept(run, folder, known):
    """Do what the callback does with a score."""
    if folder.is_best(known):
        partial = run / ".partial" / "best"
        partial.mkdir(parents=True)
        (partial / "model.safetensors").write_text(f"weights of step {known.step}")
        folder.keep_best(known, partial)
    (folder.step_folder(known.step) / "images").mkdir(parents=True)
    folder.add(known, keep_images=False)


@pytest.fixture
def run(tmp_path):
    """A run tested four times, best at step 10; at step 15 equal, at 20 better with an image that has no score."""
    folder = HeldoutFolder(tmp_path, "same plan")
    folder.begin(None)
    for known in (record(0, 0.2), record(10, 0.5), record(15, 0.5), record(20, 0.9, num_unscored=1)):
        kept(tmp_path, folder, known)
    return tmp_path


def begun(run, step, plan="same plan"):
    folder = HeldoutFolder(run, plan)
    folder.begin(step)
    return folder


def weights(run):
    return (run / "best" / "model.safetensors").read_text()


def test_of_equal_policies_the_first_is_the_best_and_gaps_do_not_count(run):
    assert weights(run) == "weights of step 10"
    images = sorted(path.parent.name for path in run.glob("heldout/*/images"))
    assert images == ["step-000000", "step-000010", "step-000020"]


def test_a_resumed_run_knows_its_best_and_forgets_what_it_takes_again(run):
    folder = begun(run, 12)
    assert [known.step for known in folder.records] == [0, 10] and folder.best == record(10, 0.5)
    assert sorted(path.name for path in (run / "heldout").iterdir()) == ["step-000000", "step-000010"]
    assert read_records(run) == folder.records
    assert begun(run, 5).best == record(10, 0.5), "a policy that is still there was forgotten"


def test_a_run_that_starts_over_keeps_nothing(run):
    folder = begun(run, None)
    assert folder.records == [] and folder.best is None and read_records(run) == []
    assert list((run / "heldout").iterdir()) == []
    kept(run, folder, record(0, 0.1))
    assert weights(run) == "weights of step 0"


def test_scores_of_another_plan_do_not_compare(run, caplog):
    folder = begun(run, 20, plan="another")
    assert folder.records == [] and folder.best is None
    assert "steps [0, 10, 15, 20] were measured in another way" in caplog.text
    assert "best holds no policy scored like this; it will be replaced" in caplog.text
    kept(run, folder, record(25, 0.1, plan="another"))
    assert weights(run) == "weights of step 25"


def test_a_best_policy_that_is_torn_is_replaced(run, caplog):
    (run / "best" / "model.safetensors").write_text("weights")
    assert begun(run, 20).best is None
    assert "is torn: model.safetensors has 7 of 18 bytes; it will be replaced" in caplog.text


def test_a_best_policy_survives_a_kill_between_two_renames(run):
    (run / ".partial").mkdir()
    (run / "best").rename(run / ".partial" / "discarded-best")
    assert begun(run, 20).best == record(10, 0.5)
    assert weights(run) == "weights of step 10"


# --- when something goes wrong ---------------------------------------------------------------------------


def callback_without_training(tmp_path, outcomes, monkeypatch):
    """A callback whose scoring gives what is listed, and the steps it scored."""
    accelerator = SimpleNamespace(is_main_process=True)
    args = SimpleNamespace(output_dir=str(tmp_path), rewards=None)
    trainer = SimpleNamespace(accelerator=accelerator, args=args, averaged=lambda: untouched_random_state())
    trainer.run_folder = SimpleNamespace(is_resumed=False)
    trainer.guard = SimpleNamespace(rollback=None, see_end=lambda step, control: ends.append(step), history=History(2))
    logged, ends = [], []

    def score(trainer, plan, folder, step):
        outcome = outcomes[step]
        if isinstance(outcome, Exception):
            raise outcome
        return record(step, outcome, plan=plan.fingerprint)

    monkeypatch.setattr(heldout, "score_policy", score)
    monkeypatch.setattr(heldout.Trainer, "log", lambda trainer, logs: logged.append(logs["heldout/score"]))
    callback = HeldoutEvaluation(trainer, plan(), steps=10)
    callback.on_train_begin(None, SimpleNamespace(global_step=0), None)
    return callback, logged, ends


def at(callback, step, max_steps=100, stopping=False, hook="on_step_begin"):
    state = SimpleNamespace(global_step=step, max_steps=max_steps)
    getattr(callback, hook)(None, state, SimpleNamespace(should_training_stop=stopping))


def test_the_first_failure_ends_the_run_and_a_later_one_leaves_a_gap(tmp_path, monkeypatch, caplog):
    broken = ValueError("the reward server is gone")
    callback, logged, _ = callback_without_training(tmp_path, {0: 0.1, 10: broken, 20: 0.3}, monkeypatch)
    for step in range(25):
        at(callback, step)
    assert logged == [0.1, 0.3] and [known.step for known in read_records(tmp_path)] == [0, 20]
    assert "the held-out evaluation of step 10 failed and is left out: the reward server is gone" in caplog.text
    callback, _, _ = callback_without_training(tmp_path, {0: broken}, monkeypatch)
    with pytest.raises(ValueError, match="the reward server is gone"):
        at(callback, 0)


def test_the_end_is_scored_once_and_an_interruption_not_at_all(tmp_path, monkeypatch):
    scores = {step: step / 100 for step in range(101)}
    callback, logged, ends = callback_without_training(tmp_path, scores, monkeypatch)
    at(callback, 33, hook="on_epoch_end")  # an epoch ends, the run does not
    callback.trainer.guard.rollback = "the guard's"
    at(callback, 100, hook="on_epoch_end")  # these steps are taken again
    callback.trainer.guard.rollback = None
    assert logged == [] == ends
    for hook in ("on_epoch_end", "on_train_end"):
        at(callback, 100, hook=hook)
    assert logged == [1.0]
    callback.stop = SimpleNamespace(stopped_at=34)
    at(callback, 34, stopping=True, hook="on_epoch_end")
    assert logged == [1.0]
    callback.stop = SimpleNamespace(stopped_at=None)  # by a callback, e.g. a deadline
    at(callback, 34, stopping=True, hook="on_epoch_end")
    assert logged == [1.0, 0.34] and ends == [100, 100]


def test_random_states_come_back():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with pytest.raises(ValueError, match="inside"), untouched_random_state():
        random.random(), np.random.rand(), torch.rand(1)
        raise ValueError("inside")
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
