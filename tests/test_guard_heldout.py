"""The guard and held-out tests: how large a loss is, which losses count, and the way back to the best checkpoint."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from stage_grpo import heldout
from stage_grpo.benchmarks import BENCHMARKS
from stage_grpo.config import StageConfig
from stage_grpo.evaluation.scores import Scores
from stage_grpo.guard_record import read_guard
from stage_grpo.guard_rules import HELDOUT_END, GuardThresholds, check, replay
from stage_grpo.guard_signals import History, Signals
from stage_grpo.heldout_record import MAX_DROP, HeldoutFolder, HeldoutRecord, read_records
from stage_grpo.training import train
from test_trainer import logged

ROOT = Path(__file__).parents[1]


# --- how large a loss is ---------------------------------------------------------------------------------


SHAPES = BENCHMARKS["shapes"]
COUNTED = [column for column in SHAPES.columns if column not in SHAPES.shared_columns]
IMAGES = 15 * len(COUNTED)


def by_category(values):
    return [values[start :: len(COUNTED)] for start in range(len(COUNTED))]


def a_test(folder, step, values):
    """Files and record of a test whose images, one a prompt, have these graded scores; categories take turns."""
    records = [
        {"path": f"{i}.png", "index": i, "sample": 0, "prompt": f"p{i}", "tag": tag, "scores": {"graded": value}}
        for i, (tag, value) in enumerate(zip(COUNTED * 15, values))
    ]
    known = np.array([np.nan if value is None else value for value in values])
    table = {"heldout": float(np.mean([np.nanmean(part) for part in by_category(known)]))}
    count = len(values)
    scores = Scores(
        "shapes", COUNTED, {"graded": table}, {}, count, {}, count, {}, {}, False, [], {}, {}, per_image=records
    )
    scores.save(folder.step_folder(step) / "scores.json")
    return HeldoutRecord(step, table["heldout"], [0.0, 1.0], "graded", "heldout", {}, {}, count, 0, 1.0, "plan")


def records_of(run, *tests):
    folder = HeldoutFolder(run, "plan")
    folder.begin(None)
    for i, values in enumerate(tests):
        folder.add(folder.compared(a_test(folder, 10 * i, values)), keep_images=False)
    return folder.records


def test_a_drop_is_the_paired_loss_in_standard_errors(tmp_path):
    rng = np.random.default_rng(0)
    start, middle, last = (rng.uniform(size=IMAGES) for _ in range(3))
    middle += 0.3
    last = 0.5 * middle + 0.5 * last - 0.2
    records = records_of(tmp_path, start.tolist(), middle.tolist(), last.tolist())
    assert [record.best_step for record in records] == [None, 0, 10] and records[0].drop is None
    for record, before, after in ((records[1], start, middle), (records[2], middle, last)):
        change = by_category(before - after)
        # Of a mean of category means; the variance divided by n, as resamples have it.
        error = np.sqrt(sum(np.var(part) / len(part) for part in change)) / len(change)
        assert record.drop == pytest.approx(np.mean([part.mean() for part in change]) / error, rel=0.05)
    assert records[1].drop < -2 and records[2].drop > 3
    assert records[2].metrics()["heldout/drop"] == records[2].drop
    assert records[2].metrics()["heldout/best_step"] == 10 and "heldout/drop" not in records[0].metrics()
    assert read_records(tmp_path) == records


def test_a_test_with_unscored_images_is_never_the_best(tmp_path):
    folder = HeldoutFolder(tmp_path, "plan")
    folder.begin(None)
    for step, score, unscored in ((0, 0.5, 0), (10, 1.0, 7), (20, 0.75, 0), (30, 0.25, 0)):
        record = dataclasses.replace(a_test(folder, step, [score] * IMAGES), num_unscored=unscored)
        folder.add(folder.compared(record), keep_images=False)
    assert [record.best_step for record in folder.records] == [None, 0, 0, 20]


@pytest.mark.parametrize(("prompts", "is_judged"), [(1, False), (9, False), (10, True)])
def test_few_prompts_a_category_say_nothing(tmp_path, caplog, prompts, is_judged):
    start, less = [1.0] * len(COUNTED) * prompts, [0.0, *[1.0] * (len(COUNTED) * prompts - 1)]
    record = records_of(tmp_path, start, less)[1]
    assert record.best_step == 0 and (record.drop is not None) == is_judged
    told = f"a category of the held-out test has {prompts} prompts; below 10 losses are not judged"
    assert (told in caplog.text) != is_judged


def test_drops_without_spread_and_without_scores(tmp_path, caplog):
    half = [0.5] * IMAGES
    same, less, gap = records_of(tmp_path / "a", half, half, [0.25] * IMAGES, [None, *half[1:]])[1:]
    assert (same.drop, less.drop, gap.drop) == (0.0, MAX_DROP, 0.0)
    assert [record.best_step for record in (same, less, gap)] == [0, 0, 0]
    folder = HeldoutFolder(tmp_path / "b", "plan")
    folder.begin(None)
    folder.add(a_test(folder, 0, half), keep_images=False)
    (folder.step_folder(0) / "scores.json").unlink()
    record = folder.compared(a_test(folder, 10, half))
    assert (record.best_step, record.drop) == (0, None)
    assert "the tests of steps 0 and 10 do not compare: " in caplog.text


# --- which losses count ----------------------------------------------------------------------------------


def after(*drops):
    history = History(2)
    for i, drop in enumerate(drops):
        history.add_test(Signals(i, heldout_drop=drop, heldout_best_step=0.0))
    return history


def test_a_dip_is_no_loss_until_it_lasts_or_the_run_ends():
    limits = GuardThresholds(max_heldout_drop=3.0)
    told = {drops: [a.rule for a in check(after(*drops), limits)] for drops in ((9.0,), (9, 2.9), (3.1, 9), (3, 9))}
    assert told == {(9.0,): [], (9, 2.9): [], (3.1, 9): ["heldout"], (3, 9): []}
    ends = [HELDOUT_END.check(after(*drops), limits) is not None for drops in ((3.1,), (9, 3), (0, 9), (-5, -4), ())]
    assert ends == [True, False, True, False, False]


def test_the_end_is_not_judged_by_an_earlier_test():
    """As where the files of the last test or of the best one are lost: that one has no drop."""
    steps = [{"step": step, "loss": 0.0} for step in range(1, 7)]
    earlier = {"step": 4, "heldout/score": 0.0, "heldout/drop": 9.0, "heldout/best_step": 0}
    last = {"step": 6, "heldout/score": 0.0, "heldout/best_step": 0}
    assert replay([*steps[:4], earlier, *steps[4:], last], GuardThresholds(), window=2) == []


def test_replay_tells_of_lasting_drops_and_of_the_end():
    def test(step, drop):
        return {"step": step, "heldout/score": 0.0, "heldout/drop": drop, "heldout/best_step": 0}

    steps = [{"step": step, "loss": 0.0} for step in range(1, 7)]
    rows = [{"step": 0, "heldout/score": 1.0}, *steps[:2], test(2, 4.0), *steps[2:4], test(4, 5.0), *steps[4:]]
    ended = [*rows, test(6, 6.0), {"step": 6, "train_runtime": 1.0}]
    told = replay(ended, GuardThresholds(), window=2)
    assert [(step, alarm.rule, alarm.value) for step, alarm in told] == [(5, "heldout", 4.0), (6, "heldout_end", 6.0)]
    assert [step for step, _ in replay(rows, GuardThresholds(), window=2)] == [5]
    assert replay([*rows, test(6, 2.0)], GuardThresholds(max_heldout_drop=4.5), window=2) == []


# --- what follows ----------------------------------------------------------------------------------------


@pytest.fixture
def losing(tmp_path, monkeypatch):
    """Runs of four steps, tested at each; with the whole learning rate the tests after step 1 show these drops."""
    rows = [json.loads(line) for line in (ROOT / "assets" / "shapes" / "heldout.jsonl").read_text().splitlines()]
    prompts = tmp_path / "heldout.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in {row["tag"]: row for row in rows}.values()))

    few = tmp_path / "train.jsonl"
    few.write_text("".join((ROOT / "assets" / "shapes" / "train.jsonl").read_text().splitlines(True)[:4]))

    def run(drops, fails_after_rollback=None, **changes):
        def score(trainer, plan, folder, step):
            first = trainer.guard.learning_rate_factor == 1
            if step == fails_after_rollback and not first:
                raise ValueError("the server is away")
            drop = drops.get(step, 0.0) if first else -1.0
            record = HeldoutRecord(step, 0.5, [0.0, 1.0], "strict", "heldout", {}, {}, 8, 0, 1.0, plan.fingerprint)
            return dataclasses.replace(record, best_step=1 if step > 1 else None, drop=drop if step > 1 else None)

        monkeypatch.setattr(heldout, "score_policy", score)
        monkeypatch.setattr(HeldoutFolder, "compared", lambda folder, record: record)
        values = {
            "model": str(ROOT / "assets" / "tiny-janus-shapes"),
            "train_prompts": str(few),
            "rewards": ["shapes"],
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_steps": 4,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "guidance_scale": 1.0,
            "gradient_checkpointing": False,
            "save_strategy": "steps",
            "save_steps": 1,
            "sample_steps": 0,
            "disable_tqdm": True,
            "bf16": False,
            "heldout_benchmark": "shapes",
            "heldout_prompts": str(prompts),
            "heldout_steps": 1,
        }
        folder = tmp_path / "run"
        result = train(StageConfig(str(folder), **{**values, **changes}))
        rows = [row for row in logged(folder) if "loss" in row and "abandoned" not in row]
        return result, read_guard(folder), rows

    return run


def test_a_run_that_ends_worse_goes_back_to_its_best_test_and_ends_there(losing):
    result, (record,), rows = losing({4: 5.0}, guard="rollback")
    assert (record.step, record.rule, record.action, record.checkpoint) == (
        4,
        "heldout_end",
        "rollback",
        "checkpoint-1",
    )
    assert (record.value, record.threshold, record.learning_rate_factor) == (5.0, 3.0, 0.5)
    assert result.stopped_by is None and result.step == 4
    assert [(row["step"], row["learning_rate"]) for row in rows] == [(1, 1e-4), *((step, 5e-5) for step in (2, 3, 4))]
    assert [known.drop for known in read_records(result.folder)] == [None, None, -1.0, -1.0, -1.0]
    assert (result.folder / "model.safetensors").is_file()


def test_a_loss_that_lasts_goes_back_as_soon_as_it_is_seen(losing):
    _, (record,), rows = losing({2: 4.0, 3: 9.0, 4: 9.0}, guard="rollback")
    # Tests of steps 2 and 3 are low; the rules see that of step 3 with step 4.
    assert (record.step, record.rule, record.value, record.checkpoint) == (4, "heldout", 4.0, "checkpoint-1")
    assert [row["learning_rate"] for row in rows] == [1e-4, 5e-5, 5e-5, 5e-5]


@pytest.mark.parametrize(
    ("changes", "note"), [({"guard": "warn"}, ""), ({"guard": "stop"}, ""), ({"guard_max_rollbacks": 0}, "; all 0 ro")]
)
def test_what_cannot_go_back_is_told_once_and_stays_whole(losing, changes, note):
    for _ in range(2):  # the second time resumes at the end
        result, (record,), rows = losing({4: 5.0}, **{"guard": "rollback", **changes})
        assert (record.step, record.rule, record.action) == (4, "heldout_end", "warn")
        assert record.message.startswith("heldout_end 5 is above guard_max_heldout_drop=3: the run ends worse")
        assert note in record.message and record.message.endswith("/best holds the best policy")
        assert (result.stopped_by, result.step, len(rows)) == (None, 4, 4)


def test_a_resumed_run_knows_its_earlier_tests_and_counts_each_once(losing):
    """The last one was seen at the end of the first part already: it is one low test, and the next one the second."""
    losing({4: 5.0}, guard="stop", save_steps=2)
    result, (record,), _ = losing({4: 5.0, 5: 6.0}, guard="stop", save_steps=2, max_steps=7)
    assert (record.step, record.rule, record.value, result.step) == (6, "heldout", 5.0, 6)


def test_what_was_tested_in_another_way_is_forgotten(losing):
    losing({3: 5.0}, guard="stop", max_steps=3)
    result, told, _ = losing({4: 0.0, 5: 5.0}, guard="stop", max_steps=6, heldout_num_images=2)
    assert result.stopped_by is None and told == []


def test_a_test_that_fails_after_a_rollback_leaves_a_gap(losing):
    result, (record,), _ = losing({4: 5.0}, guard="rollback", fails_after_rollback=2)
    assert record.action == "rollback" and result.step == 4
    assert [known.step for known in read_records(result.folder)] == [0, 1, 3, 4]


def test_a_run_that_resumes_at_its_end_may_still_go_back(losing):
    """As one that is killed between its last test and the way back."""
    losing({4: 5.0}, guard="warn")
    result, (record,), rows = losing({4: 5.0}, guard="rollback")
    assert (record.action, record.checkpoint, record.rollbacks) == ("rollback", "checkpoint-1", 0)
    assert [row["learning_rate"] for row in rows] == [1e-4, 5e-5, 5e-5, 5e-5]
    assert (result.stopped_by, result.step) == (None, 4)
