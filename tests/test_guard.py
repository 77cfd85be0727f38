"""The guard: rules on typed-in histories, broken steps kept out of the weights, runs that fall apart and come back."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from stage_grpo.cli import main
from stage_grpo.config import parse_config
from stage_grpo.guard import Guard
from stage_grpo.guard_record import GuardRecord, append_guard, before_trouble, read_guard, rollback_to
from stage_grpo.guard_rules import RULES, GuardThresholds, adapted_beta, check, replay
from stage_grpo.guard_signals import FreshMetrics, History, Signals
from stage_grpo.run_checkpoints import defect, seal
from stage_grpo.run_record import read_run
from stage_grpo.training import train
from test_resume import assert_equal_weights, make, numbers, weights_of
from test_trainer import config, logged, scored_batch

ROOT = Path(__file__).parents[1]
HEALTHY = {
    "kl": 0.4,
    "entropy_policy": 2.0,
    "entropy_reference": 2.0,
    "zero_variance": 0.2,
    "reward_spread": 0.3,
    "grad_norm": 0.5,
    "unique_images": 1.0,
    "similarity": 0.6,
}


def history(**series):
    """Five healthy steps, then five with these values: one number for all of them, or a list."""
    made = History(5)
    for i in range(10):
        changed = {name: value[i - 5] if isinstance(value, list) else value for name, value in series.items()}
        made.add(Signals(i + 1, **{**HEALTHY, **(changed if i >= 5 else {})}))
    return made


BROKEN = {
    # name of the rule: (what the last five steps showed, what the rule says of it)
    "kl": ({"kl": 3.0}, 1.5),  # 3 nats over 2 nats of entropy
    "kl_slope": ({"kl": [0.4, 0.8, 1.2, 1.6, 2.0]}, 0.2),  # 0.4 nats a step over 2
    "entropy_low": ({"entropy_policy": 0.5, "entropy_reference": 1.0}, 0.5),
    "entropy_high": ({"entropy_policy": 4.0}, 2.0),
    "grad_norm": ({"grad_norm": 100.0}, 200.0),
    "unique_images": ({"unique_images": [0.25, 0.25, 0.25, 1.0, 1.0]}, 0.25),
    "heldout": ({"heldout_drop": [5.0, None, None, None, 4.0], "heldout_best_step": 2.0}, 4.0),
    "zero_variance": ({"zero_variance": [1.0, 1.0, 1.0, 0.9, 1.0]}, 0.98),
    "reward_spread": ({"reward_spread": 0.0}, 0.0),
    "similarity": ({"similarity": 0.99}, 0.99),
}


def test_every_rule_has_a_history_that_breaks_it():
    assert BROKEN.keys() == {rule.name for rule in RULES}
    assert check(history(), GuardThresholds()) == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_told_with_its_number(name):
    series, value = BROKEN[name]
    (alarm,) = check(history(**series), GuardThresholds())
    assert alarm.rule == name and alarm.value == pytest.approx(value, abs=1e-12)
    assert alarm.message.startswith(f"{name} {alarm.value:.4g} is ") and "\n" not in alarm.message
    assert alarm.acts == (name not in ("zero_variance", "reward_spread", "similarity"))


def test_a_value_on_the_threshold_is_within():
    assert check(history(kl=2.0), GuardThresholds(max_kl=1.0)) == []
    assert check(history(unique_images=0.5), GuardThresholds(min_unique_images=0.5)) == []
    assert check(history(kl=2.0), GuardThresholds(max_kl=0.999))[0].rule == "kl"


def test_single_peaks_and_gaps_are_no_alarm():
    """One token that the reference likes far more makes a KL of hundreds in one step of a healthy run."""
    assert check(history(kl=[0.4, 300.0, 0.4, 0.4, 80.0]), GuardThresholds()) == []
    assert check(history(kl=[0.4, None, None, 0.4, 0.4]), GuardThresholds()) == []
    assert check(history(**dict.fromkeys(HEALTHY, None)), GuardThresholds()) == []


def test_nothing_is_said_before_a_whole_window():
    young = History(5)
    for step in range(1, 5):
        young.add(Signals(step, **{**HEALTHY, "kl": 50.0, "unique_images": 0.1}))
        assert check(young, GuardThresholds()) == []
    young.add(Signals(5, **{**HEALTHY, "kl": 50.0, "unique_images": 0.1}))
    assert [alarm.rule for alarm in check(young, GuardThresholds())] == ["kl", "unique_images"]


def test_a_history_survives_as_json():
    before, after = history(kl=[0.1 + 0.2, 1 / 3, 0.4, 1e-17, 2.0]), History(5)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after == before
    smaller = History(3)
    smaller.load_state_dict(before.state_dict())
    assert [signals.step for signals in smaller.recent] == [8, 9, 10]
    larger = History(8)
    larger.load_state_dict(before.state_dict())
    larger.add(Signals(11))
    assert [signals.step for signals in larger.start] == [1, 2, 3, 4, 5]  # step 11 is not the start of the run
    young = History(3)
    for step in (1, 2, 3):
        young.add(Signals(step))
    larger.load_state_dict(young.state_dict())
    larger.add(Signals(4))
    assert [signals.step for signals in larger.start] == [1, 2, 3, 4]


def test_a_history_takes_up_held_out_tests_in_order():
    young = History(5)
    young.add(Signals(3, heldout_drop=9.0, heldout_best_step=1.0))
    tests = [Signals(2), Signals(4, heldout_drop=1 / 3, heldout_best_step=2.0), Signals(6, heldout_best_step=2.0)]
    young.take_up_tests([*tests, Signals(8, heldout_drop=-0.5, heldout_best_step=2.0)])
    assert (young.heldout_drops, young.heldout_best_step) == ([1 / 3, -0.5], 2)
    young.add(Signals(11, heldout_drop=0.0, heldout_best_step=8.0))
    young.add(Signals(12))
    assert (young.heldout_drops, young.heldout_best_step) == ([-0.5, 0.0], 8)


def test_replay_tells_each_episode_once():
    def row(step, kl):
        return {"step": step, "loss": 0.0, "kl": kl, "entropy/reference": 1.0}

    kls = [0.1, 0.1, 0.1, 5.0, 5.0, 5.0, 0.1, 0.1, 5.0, 5.0]
    rows = [row(i + 1, kl) for i, kl in enumerate(kls)] + [{"step": 10, "train_runtime": 3.0}]
    rows[2:2] = [{**row(step, 9.0), "abandoned": 1, "heldout/score": 9.0} for step in (3, 4, 5)]  # taken back
    told = replay(rows, GuardThresholds(max_kl_slope=math.inf), window=3)
    # Medians of three: .1 .1 5 5 5 .1 .1 5 from step 3 on.
    assert [(step, alarm.rule, alarm.value) for step, alarm in told] == [(5, "kl", 5.0), (10, "kl", 5.0)]


def test_fresh_metrics_are_those_since_the_last_question():
    metrics = {}
    fresh = FreshMetrics(metrics)
    assert fresh.mean("kl") is None
    metrics["kl"] = [1.0, 3.0]
    assert fresh.mean("kl") == 2.0 and fresh.mean("kl") is None
    metrics["kl"] += [math.nan, 5.0, math.inf]
    assert fresh.mean("kl") == 5.0
    metrics.clear()
    metrics["kl"] = [7.0, 8.0, 9.0, 10.0, 11.0]  # as many as before: told apart by the list, not by its length
    assert fresh.mean("kl") == 9.0


@pytest.mark.parametrize(
    ("kl", "factor"), [(0.2, 1.0), (0.21, 1.005), (0.19, 0.995), (0.24, 1.02), (5.0, 1.02), (0.0, 0.98)]
)
def test_beta_follows_the_controller(kl, factor):
    """Target 0.2: an error of 5 % moves beta by 0.5 %, one of 20 % or more by 2 %."""
    assert adapted_beta(0.04, kl, 0.2) == pytest.approx(0.04 * factor, rel=1e-12)


SAVING = {"guard": "rollback", "save_strategy": "steps", "save_steps": 5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guard": "on"}, "guard='on' is unknown; use one of off, warn, stop, rollback"),
        ({"guard_remedy": "pray"}, "guard_remedy='pray' is unknown"),
        ({"guard_window": 1}, "guard_window=1 must be a whole number of at least 2"),
        ({"guard_window": 2.5}, "guard_window=2.5 must be a whole number"),
        ({"guard_window": None}, "guard_window=None must be a whole number"),
        ({"guard_max_rollbacks": 1.5}, "guard_max_rollbacks=1.5 must be a whole number of at least 0"),
        ({"guard_lr_factor": [0.5]}, "guard_lr_factor=[0.5] must lie between 0 and 1"),
        ({"kl_target": "0.3x"}, "kl_target='0.3x' must be above 0"),
        ({"guard_max_kl": math.nan}, "guard_max_kl=nan must be a number; use inf"),
        ({"guard_lr_factor": 2.0}, "guard_lr_factor=2.0 must lie between 0 and 1"),
        ({"guard_beta_factor": 0.5}, "guard_beta_factor=0.5 must be above 1"),
        ({"kl_target": 0.0}, "kl_target=0.0 must be above 0"),
        ({"kl_target": 0.2, "beta": 0.0, "preset": "grpo"}, "kl_target=0.2 adapts beta, but beta=0"),
        ({"guard": "rollback"}, "save_strategy='no' writes none"),
        ({**SAVING, "save_only_model": True}, "save_only_model"),
        ({**SAVING, "guard_remedy": "beta", "beta": 0.0, "preset": "grpo"}, "set guard_remedy=learning_rate"),
        ({**SAVING, "save_total_limit": 2}, "save_total_limit=2 with save_steps=5 keeps no checkpoint from before"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, values, message):
    with pytest.raises(ValueError) as error:
        config(tmp_path, **values)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_keys_are_read_from_yaml_and_flags(tmp_path):
    assert config(tmp_path, **SAVING, save_total_limit=3).guard == "rollback"
    (tmp_path / "run.yaml").write_text(f"output_dir: {tmp_path}\nguard: off\nguard_max_kl: .inf\nkl_target: 0.3\n")
    read = parse_config("stage train", [str(tmp_path / "run.yaml"), "--guard_max_similarity", "0.5"])
    assert (read.guard, read.guard_max_kl, read.kl_target) == ("off", math.inf, 0.3)
    assert GuardThresholds.of(read) == GuardThresholds(max_kl=math.inf, max_similarity=0.5)


def test_a_guard_that_only_watches_changes_no_number(checkpoint, tmp_path):
    runs = {}
    for mode in ("off", "stop"):
        runs[mode] = make(
            checkpoint,
            tmp_path / mode,
            guard=mode,
            guard_window=2,
            guard_max_kl_slope=math.inf,
            max_steps=4,
            save_strategy="no",
            logging_steps=2,
        )
        runs[mode].train()
    plain, watched = numbers(tmp_path / "off"), numbers(tmp_path / "stop")
    own = {name for row in watched for name in row if name.startswith("guard/")}
    assert own == {"guard/skipped_steps", "guard/alarms"}
    assert [{name: row[name] for name in row if name not in own} for row in watched] == plain
    assert len(plain) == 2 and not any(name.startswith("guard/") for row in plain for name in row)
    assert_equal_weights(weights_of(runs["stop"]), weights_of(runs["off"]))


def broken_at(trainer, steps, how):
    """Make some optimizer steps of a trainer break; note weights and optimizer state around each step."""
    states, compute, step = [], trainer._compute_loss, trainer._get_grad_norm

    def compute_loss(model, inputs):
        loss = compute(model, inputs)
        return loss * math.nan if how == "loss" and trainer.state.global_step + 1 in steps else loss

    def norm(model, grad_norm=None):
        if how == "gradient" and trainer.state.global_step + 1 in steps:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[3] = math.inf
            grad_norm = trainer._clip_grad_norm(model)
        states.append((weights_of(trainer), optimizer_of(trainer)))
        return step(model, grad_norm)

    trainer._compute_loss, trainer._get_grad_norm = compute_loss, norm
    return states


def optimizer_of(trainer):
    state = trainer.optimizer.state_dict()["state"]
    return {f"{i}/{name}": value.clone() for i, values in state.items() for name, value in values.items()}


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_broken_step_leaves_weights_and_optimizer_as_they_were(checkpoint, tmp_path, how):
    trainer = make(checkpoint, tmp_path, max_steps=4, weight_decay=0.1, save_strategy="no", rows=8)
    states = broken_at(trainer, {2}, how)  # taken before steps 1, 2, 3, 4
    trainer.train()
    assert_equal_weights(states[1][0], states[2][0])
    assert_equal_weights(states[1][1], states[2][1])
    for before, after in ((0, 1), (2, 3)):
        assert any(not torch.equal(states[before][0][name], states[after][0][name]) for name in states[0][0])
    rows = [row for row in logged(tmp_path) if "loss" in row]
    assert [row["guard/skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert [row["grad_norm"] is None for row in rows] == [False, True, False, False]
    (record,) = read_guard(tmp_path)
    assert (record.step, record.rule, record.action, record.value) == (2, "not_finite", "skip", None)
    assert ("loss nan" in record.message) == (how == "loss") and "1 of 5 in a row" in record.message


def test_without_the_guard_a_broken_step_ruins_the_weights(checkpoint, tmp_path):
    trainer = make(checkpoint, tmp_path, max_steps=1, guard="off", save_strategy="no")
    broken_at(trainer, {1}, "loss")
    trainer.train()
    assert any(values.isnan().any() for values in weights_of(trainer).values())
    assert not (tmp_path / "guard.jsonl").exists()


def test_broken_steps_in_a_row_end_the_run_and_name_the_last_checkpoint(checkpoint, tmp_path):
    trainer = make(checkpoint, tmp_path, max_steps=9, save_steps=2, guard_max_skipped=3)
    states = broken_at(trainer, {2, 4, 5, 6}, "loss")
    with pytest.raises(ValueError) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith("step 6: 3 steps in a row had no finite loss and gradient, and were skipped; ")
    assert f"the last whole checkpoint is {tmp_path / 'checkpoint-4'}" in message and "\n" not in message
    assert defect(tmp_path / "checkpoint-4") is None
    assert_equal_weights(weights_of(trainer), states[3][0])  # as they were before step 4
    actions = [(record.step, record.action) for record in read_guard(tmp_path)]
    assert actions == [(2, "skip"), (4, "skip"), (5, "skip"), (6, "skip"), (6, "fail")]


@pytest.fixture
def untrained(tmp_path):
    """A guard that may go back, with a trainer that never trains, and the checkpoint of the beginning."""
    args = config(tmp_path, **SAVING)
    trainer = SimpleNamespace(args=args, beta=args.beta, accelerator=SimpleNamespace(is_main_process=True))
    trainer._metrics, trainer.lineage, trainer.state = {"train": {}}, ["its mark"], SimpleNamespace(max_steps=100)
    (tmp_path / "checkpoint-0").mkdir()
    (tmp_path / "checkpoint-0" / "model").write_text("weights")
    (tmp_path / "checkpoint-0" / "run_state.json").write_text('{"lineage": ["its mark"]}')
    seal(tmp_path / "checkpoint-0")
    return Guard(trainer)


def test_a_run_that_breaks_in_its_first_window_goes_back_to_its_beginning(untrained):
    untrained.skipped_in_a_row = untrained.args.guard_max_skipped
    record = untrained._judge(5)
    assert (record.action, record.checkpoint, untrained.args.guard_window) == ("rollback", "checkpoint-0", 10)
    # Once that is used up as well, nobody is told to do what was done.
    untrained.args.guard_max_rollbacks = 0
    with pytest.raises(
        ValueError, match=r"; all 0 rollbacks are used up; .* begin again with a smaller learning_rate$"
    ):
        untrained._act(untrained._judge(5), None)
    untrained.args.guard = "warn"
    with pytest.raises(ValueError, match=r"with a smaller learning_rate, or let guard=rollback lower it$"):
        untrained._act(untrained._judge(5), None)


def test_a_rollback_is_refused_where_nobody_goes_back(untrained):
    with pytest.raises(
        ValueError, match=r"start it with stage_grpo.training.train\(config\) instead of trainer.train"
    ):
        untrained.on_train_begin(untrained.args, SimpleNamespace(global_step=0), None)


def test_beta_reaches_all_of_the_loss(checkpoint, tmp_path):
    """d loss / d beta is the weighted KL, TRL's share and that of the KL weights together."""
    trainer = make(checkpoint, tmp_path, kl_weight_form="graded", save_strategy="no")
    batch = scored_batch(trainer)
    losses = []
    for beta in (0.5, 2.5):
        trainer.beta = beta
        with torch.no_grad():
            losses.append(trainer._compute_loss(trainer.model, dict(batch)).item())
    kl, weighted = (trainer._metrics["train"][name][-1] for name in ("kl", "kl_weighted"))
    assert (losses[1] - losses[0]) / 2 == pytest.approx(weighted, rel=1e-5) and abs(kl - weighted) > 0.1 * kl


def test_an_adapted_beta_follows_the_formula_and_survives_a_resume(checkpoint, tmp_path):
    adaptive = {"kl_target": 1e-3, "beta": 0.05, "max_steps": 5}
    straight = make(checkpoint, tmp_path / "a", **adaptive)
    straight.train()
    rows = [row for row in logged(tmp_path / "a") if "loss" in row]
    beta = 0.05
    for row in rows:
        assert row["beta"] == beta
        beta = adapted_beta(beta, row["kl"], 1e-3)
    assert beta == straight.beta and rows[1]["beta"] == 0.05 * (1 - 0.1 * 0.2)  # the first KL is 0
    make(checkpoint, tmp_path / "b", **{**adaptive, "max_steps": 3, "lr_scheduler_type": "constant"}).train()
    resumed = make(checkpoint, tmp_path / "b", **adaptive)
    resumed.train(resume_from_checkpoint=True)
    assert [row["beta"] for row in numbers(tmp_path / "b") if "loss" in row] == [row["beta"] for row in rows]
    assert resumed.beta == straight.beta
    assert_equal_weights(weights_of(resumed), weights_of(straight))


@pytest.fixture
def diverging(tmp_path, monkeypatch):
    """The trained tiny Janus with a learning rate fifty times too large: its KL passes 3 nats within two steps."""
    recipe = {
        "output_dir": "out",
        "model": str(ROOT / "assets" / "tiny-janus-shapes"),
        "train_prompts": str(ROOT / "assets" / "shapes" / "train.jsonl"),
        "rewards": ["shapes"],
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 9,
        "learning_rate": 0.01,
        "beta": 0.01,
        "lr_scheduler_type": "constant",
        "guidance_scale": 1.0,
        "gradient_checkpointing": False,
        "save_steps": 1,
        "sample_steps": 0,
        "disable_tqdm": True,
        "guard_window": 3,
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def trained(folder, **changed):
    """A run of the recipe: its result, what the guard did beside warning, and the rows of its steps."""
    words = [word for name, value in changed.items() for word in (f"--{name}", str(value))]
    result = train(parse_config("stage train", ["run.yaml", *words]))
    return result, [record for record in read_guard(folder / "out") if record.action != "warn"], logged_steps(folder)


def logged_steps(folder):
    return [row for row in logged(folder / "out") if "loss" in row]


def test_a_diverging_run_is_warned_of_once(diverging, caplog):
    result, acted, rows = trained(diverging, max_steps=6, save_strategy="no")
    assert result.stopped_by is None and result.step == 6 and acted == []
    told = [record for record in read_guard(diverging / "out") if record.rule == "kl"]
    assert len(told) == 1 and told[0].value > told[0].threshold == 1 and told[0].step == 3
    assert caplog.text.count("guard, step 3, warn: kl ") == 1 and caplog.text.count("warn: kl ") == 1
    assert rows[2]["guard/alarms"] >= 1 and rows[1]["guard/alarms"] == 0
    assert min(row["kl"] for row in rows[1:]) > 1


def test_a_diverging_run_stops_with_a_checkpoint_and_says_why(diverging, capsys):
    main(["train", "run.yaml", "--guard", "stop", "--max_steps", "4"])
    (stopped,) = [record for record in read_guard(diverging / "out") if record.action == "stop"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"guard: {stopped.message}: saved out/checkpoint-3; continue with" and stopped.step == 3
    assert defect(diverging / "out" / "checkpoint-3") is None
    assert not (diverging / "out" / "model.safetensors").exists()
    # Going on is a decision: what was told is not told again, so the run goes on to its end.
    main(lines[-1].split()[1:])
    assert capsys.readouterr().out.splitlines()[-1] == "saved out"


RISING = {"learning_rate": 0.04, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 40}
"""0.001 x (step - 1): the first steps are sound, the fourth is not."""


def split(rows, number):
    """Rows that a rollback took back, and those that came after it."""
    return [row for row in rows if row.get("abandoned") == number], [row for row in rows if "abandoned" not in row]


def test_a_diverging_run_goes_back_with_a_smaller_learning_rate_and_is_stopped_in_the_end(diverging):
    result, (rollback, stopped), rows = trained(diverging, guard="rollback", guard_max_rollbacks=1, **RISING)
    out = diverging / "out"
    assert (rollback.action, rollback.rollbacks, rollback.learning_rate_factor) == ("rollback", 0, 0.5)
    assert (stopped.action, stopped.rollbacks, stopped.learning_rate_factor) == ("stop", 1, 0.5)
    assert str(result.stopped_by).endswith("; all 1 rollbacks are used up") and result.step == stopped.step
    last = int(rollback.checkpoint.removeprefix("checkpoint-"))
    assert rollback.message.endswith(f"back to checkpoint-{last} with learning_rate x 0.5")
    assert last == rollback.step - 3
    gone, kept = split(rows, 1)
    assert [row["step"] for row in gone] == list(range(last + 1, rollback.step + 1))
    assert [row["step"] for row in kept] == list(range(1, stopped.step + 1))
    assert [row["step"] for row in read_run(out).metrics if "loss" in row] == [row["step"] for row in kept]
    for row in kept:
        scale = 0.5 if row["step"] > last else 1
        assert row["learning_rate"] == pytest.approx(scale * 0.001 * (row["step"] - 1), rel=1e-9)
    # The same weights and random streams: the next step samples what the abandoned one sampled.
    again = kept[last]
    for name in ("reward", "kl", "entropy/policy", "grad_norm", "loss"):
        assert again[name] == gone[0][name], name
    moved = sorted(path.name for path in (out / "rolled_back" / "1").iterdir())
    assert moved == [f"checkpoint-{step}" for step in range(last + 1, rollback.step)]
    assert all(defect(out / "rolled_back" / "1" / name) is None for name in moved)
    assert defect(out / f"checkpoint-{stopped.step}") is None


def test_a_run_that_diverges_before_its_first_checkpoint_goes_back_to_its_beginning(diverging):
    held = {"heldout_benchmark": "shapes", "heldout_prompts": str(heldout_rows(diverging)), "heldout_steps": 2}
    result, (rollback, stopped), rows = trained(
        diverging, guard="rollback", guard_max_rollbacks=1, save_steps=100, max_steps=5, guard_lr_factor=0.25, **held
    )
    assert (rollback.step, rollback.checkpoint, stopped.action) == (3, "checkpoint-0", "stop")
    assert stopped.rollbacks == 1 and str(result.stopped_by).endswith("; all 1 rollbacks are used up")
    gone, kept = split(rows, 1)
    assert [row["step"] for row in gone] == [1, 2, 3] and [row["step"] for row in kept][:3] == [1, 2, 3]
    assert {row["learning_rate"] for row in gone} == {0.01} and {row["learning_rate"] for row in kept} == {0.0025}
    for name in ("reward", "kl", "entropy/policy", "grad_norm", "loss"):
        assert kept[0][name] == gone[0][name], name  # the weights and random streams of the beginning
    # Begun anew, the folder is another run's: nothing of the first stays.
    trained(diverging, guard="rollback", max_steps=1, resume="never")
    assert read_guard(diverging / "out") == [] and len(logged_steps(diverging)) == 1


def heldout_rows(folder):
    """One prompt of each category."""
    rows = [json.loads(line) for line in (ROOT / "assets" / "shapes" / "heldout.jsonl").read_text().splitlines()]
    path = folder / "heldout.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in {row["tag"]: row for row in rows}.values()))
    return path


def test_a_diverging_run_goes_back_with_a_larger_beta(diverging):
    remedy = {"guard_remedy": "beta", "guard_beta_factor": 3, "guard_max_rollbacks": 1, "save_total_limit": 4}
    _, (rollback, *_), rows = trained(diverging, guard="rollback", max_steps=5, **remedy, **RISING)
    assert (rollback.learning_rate_factor, rollback.beta_factor) == (1, 3)
    gone, kept = split(rows, 1)
    # The steps after the first new one come from an update of another beta, and so differ.
    again, before = (next(row for row in part if row["step"] == gone[0]["step"] + 1) for part in (kept, gone))
    assert again["learning_rate"] == before["learning_rate"]
    assert (again["beta"], "beta" in before) == (pytest.approx(0.03, rel=1e-12), False)
    # Without the guard the run goes on with the beta that it has come to, and says so.
    *_, rows = trained(diverging, guard="off", max_steps=kept[-1]["step"] + 1, **remedy, **RISING)
    assert split(rows, 1)[1][-1]["beta"] == pytest.approx(0.03, rel=1e-12)


def test_trouble_that_comes_back_at_once_began_before_the_checkpoint(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), guard_window=10)
    assert [before_trouble(args, step) for step in (50, 10, 3)] == [40, 0, 0]

    def told(step, action, checkpoint):
        append_guard(tmp_path, GuardRecord(step, "kl", action, 2.0, 1.0, "m", checkpoint=checkpoint))

    told(50, "rollback", "checkpoint-40")
    told(45, "warn", None)
    assert [before_trouble(args, step) for step in (42, 59, 60, 90)] == [30, 30, 50, 80]
    told(42, "rollback", "checkpoint-30")
    assert [before_trouble(args, step) for step in (38, 49, 50)] == [20, 20, 40]
    told(38, "rollback", "checkpoint-0")
    assert [before_trouble(args, step) for step in (10, 19, 25)] == [0, 0, 15]


def test_a_kill_after_a_rollback_keeps_what_was_decided(checkpoint, tmp_path):
    """From the checkpoint itself, which does not know of the rollback, and from the next one, which does."""
    trainer = make(checkpoint, tmp_path, max_steps=3, lr_scheduler_type="constant", guard_window=2)
    trainer.train()
    first = {"step": 4, "rule": "kl", "action": "rollback", "value": 9.0, "threshold": 1.0, "message": "m"}
    first |= {"checkpoint": "checkpoint-3", "learning_rate_factor": 0.75}
    second = {**first, "step": 3, "rollbacks": 1, "checkpoint": "checkpoint-2"}
    second |= {"learning_rate_factor": 0.5, "beta_factor": 2.0}
    # The first one went to a checkpoint-3 that the second one took back; the next checkpoint-3 is another.
    (tmp_path / "guard.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (first, second)) + '{"torn')
    assert rollback_to(tmp_path, tmp_path / "checkpoint-1") is None
    assert rollback_to(tmp_path / "another", tmp_path / "checkpoint-2") is None
    for start, max_steps in (("checkpoint-2", 3), ("checkpoint-3", 4)):
        resumed = make(checkpoint, tmp_path, max_steps=max_steps, lr_scheduler_type="constant", guard_window=2)
        resumed.train(resume_from_checkpoint=str(tmp_path / start))
        assert logged(tmp_path)[-2]["learning_rate"] == 0.5e-3  # halved once, not twice
        assert resumed.beta == 2 * resumed.args.beta
        assert (resumed.guard.rollbacks, resumed.guard.learning_rate_factor) == (2, 0.5)
    # A run that begins at the beginning, or before the rollback, knows nothing of it.
    before = make(checkpoint, tmp_path, max_steps=2, lr_scheduler_type="constant", guard_window=2)
    before.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert before.guard.rollbacks == 0 and logged(tmp_path)[-2]["learning_rate"] == 1e-3
    assert read_guard(tmp_path) == []
