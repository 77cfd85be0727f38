"""Where rollbacks go: to checkpoints of this training alone, kept for it, and to the next best where one is gone."""

import json
from types import SimpleNamespace

import pytest

from stage_grpo.guard import Guard
from stage_grpo.guard_record import GuardRecord, append_guard, newest_whole_until, way_back
from stage_grpo.heldout_record import HeldoutRecord
from stage_grpo.run_checkpoints import rotate, seal
from test_resume import make


def a_checkpoint(run, step, mark):
    folder = run / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "run_state.json").write_text(json.dumps({"lineage": ["first", mark] if mark else []}))
    seal(folder)
    return folder


@pytest.fixture
def options(tmp_path):
    return SimpleNamespace(
        output_dir=str(tmp_path),
        guard_window=10,
        guard_max_rollbacks=3,
        guard_remedy="learning_rate",
        guard_lr_factor=0.5,
    )


def test_only_checkpoints_of_this_training_are_ways_back(tmp_path, options):
    a_checkpoint(tmp_path, 20, "a")
    for step, mark in ((25, "another run's"), (30, None), (35, ["no mark"])):
        a_checkpoint(tmp_path, step, mark)
    (tmp_path / "checkpoint-36").mkdir()
    assert newest_whole_until(tmp_path, 40, ["a", "b"]) == tmp_path / "checkpoint-20"
    assert newest_whole_until(tmp_path, 40, ["b"]) is None
    damaged = a_checkpoint(tmp_path, 40, "b") / "run_state.json"
    assert newest_whole_until(tmp_path, 40, ["a", "b"]) == tmp_path / "checkpoint-40"
    assert way_back(options, 50, "kl", None, 0, ["a", "b"])[0] == tmp_path / "checkpoint-40"
    damaged.write_text(damaged.read_text().replace("first", "worst"))
    assert newest_whole_until(tmp_path, 40, ["a", "b"]) == tmp_path / "checkpoint-20"
    assert newest_whole_until(tmp_path, 40, ["a", "b"], hashes=False) == tmp_path / "checkpoint-40"


def test_a_run_begun_anew_does_not_know_the_checkpoints_of_an_earlier_one(checkpoint, tmp_path):
    make(checkpoint, tmp_path, max_steps=2).train()
    anew = make(checkpoint, tmp_path, max_steps=1)
    anew.train()
    assert newest_whole_until(tmp_path, 2, anew.lineage) == tmp_path / "checkpoint-1"
    resumed = make(checkpoint, tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert newest_whole_until(tmp_path, 2, resumed.lineage) == tmp_path / "checkpoint-2"
    assert newest_whole_until(tmp_path, 2, anew.lineage) == tmp_path / "checkpoint-1"


def test_where_nothing_older_is_left_the_same_checkpoint_is_better_than_none(tmp_path, options):
    a_checkpoint(tmp_path, 100, "a")
    append_guard(tmp_path, GuardRecord(158, "kl", "rollback", 2.0, 1.0, "m", checkpoint="checkpoint-100"))
    for step in (119, 120):
        found, note = way_back(options, step, "kl", None, 1, ["a"])
        assert found == tmp_path / "checkpoint-100" and note == "; back to checkpoint-100 with learning_rate x 0.5"
    a_checkpoint(tmp_path, 90, "b")
    assert way_back(options, 119, "kl", None, 1, ["a", "b"])[0] == tmp_path / "checkpoint-90"
    assert way_back(options, 119, "heldout", 95, 1, ["a", "b"])[0] == tmp_path / "checkpoint-90"
    assert way_back(options, 119, "heldout", 80, 1, ["a", "b"]) == (
        None,
        "; no whole checkpoint is of step 80 or older",
    )


@pytest.mark.parametrize(("mode", "kept"), [("rollback", [30, 50]), ("stop", [50])])
def test_the_checkpoint_of_the_best_test_outlives_the_limit(checkpoint, tmp_path, mode, kept):
    saving = {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 2}
    trainer = make(checkpoint, tmp_path, guard=mode, **saving)
    trainer.lineage = ["10", "30", "40", "50"]
    for step in (10, 20, 30, 40, 50):
        a_checkpoint(tmp_path, step, str(step))  # that of step 20 is another run's
    tests = ((0, 0.5, 0), (36, 0.9, 0), (38, 0.9, 0), (45, 0.99, 3), (48, 0.4, 0))
    records = [
        HeldoutRecord(step, score, [0.0, 1.0], "strict", "heldout", {}, {}, 8, unscored, 1.0, "plan")
        for step, score, unscored in tests
    ]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(vars(record)) + "\n" for record in records))
    rotate(tmp_path, 1, trainer._protected())
    assert sorted(int(path.name.removeprefix("checkpoint-")) for path in tmp_path.glob("checkpoint-*")) == kept


def test_what_was_only_told_is_acted_on_in_another_mode(checkpoint, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 10}
    told = make(checkpoint, tmp_path, guard="warn", **saving).guard
    told.alarmed = {"kl", "similarity"}
    state = json.loads(json.dumps(told.state_dict()))
    for mode, known in (("warn", {"kl", "similarity"}), ("stop", {"similarity"}), ("rollback", {"similarity"})):
        guard = Guard(make(checkpoint, tmp_path, guard=mode, **saving))
        guard.load_state_dict(state)
        assert guard.alarmed == known, mode
