"""A run that was interrupted and continued is the run that was not; what is torn is never taken for whole."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import PROMPTS
from stage_grpo.cli import main
from stage_grpo.policy.adapters import is_adapter
from stage_grpo.resuming import MATHS, NEUTRAL, NO_EFFECT, NO_RESULT, begin_anew, changes, check_continuable
from stage_grpo.run_checkpoints import defect, newest_whole, rotate, seal
from stage_grpo.run_folder import RunFolder
from stage_grpo.run_record import read_run
from test_trainer import config, dataset, logged, trainer_for

MEASURED = (
    "seconds/",
    "memory/",
    "step_time",
    "images_per_second",
    "train_",
    "total_flos",
    "runtime",
    "samples_per",
    "steps_per",
)

SETTINGS = {
    "one rollout a step, several epochs": {"rows": 5, "max_steps": 6},
    "a rollout for two steps": {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "per_device_train_batch_size": 4,
    },
    "two iterations, evaluation between": {
        "num_iterations": 2,
        "eval_dataset": dataset(4),
        "per_device_eval_batch_size": 4,
        "num_generations_eval": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
    "averaged weights, cosine schedule": {"ema_decay": 0.9, "lr_scheduler_type": "cosine"},
    "synced reference": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
    "guided scoring, dropout of nothing": {"guidance_in_scoring": True, "weight_decay": 0.1},
}


def make(checkpoint, folder, **changed):
    values = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "rows": 5, **changed}
    return trainer_for(checkpoint, folder, **values)


def numbers(folder):
    """Every logged number that does not measure the machine."""
    rows = [row for row in logged(folder) if "train_runtime" not in row]
    return [
        {name: value for name, value in row.items() if not name.removeprefix("eval_").startswith(MEASURED)}
        for row in rows
    ]


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_equals_the_straight_run_to_the_bit(checkpoint, tmp_path, name):
    straight = make(checkpoint, tmp_path / "a", **SETTINGS[name])
    straight.train()
    for step in (3, 4):
        # What a process killed after this step leaves behind, with rows logged beyond it.
        shutil.copytree(tmp_path / "a", tmp_path / f"b{step}")
        for later in range(step + 1, 7):
            shutil.rmtree(tmp_path / f"b{step}" / f"checkpoint-{later}", ignore_errors=True)
        torch.manual_seed(step)
        resumed = make(checkpoint, tmp_path / f"b{step}", **SETTINGS[name])
        resumed.train(resume_from_checkpoint=True)
        assert numbers(tmp_path / f"b{step}") == numbers(tmp_path / "a")
        assert_equal_weights(weights_of(resumed), weights_of(straight))
        if straight.averaging is not None:
            assert_equal_weights(resumed.averaging.average.averages, straight.averaging.average.averages)
        if straight.args.sync_ref_model:
            assert_equal_weights(
                dict(resumed.ref_model.named_parameters()), dict(straight.ref_model.named_parameters())
            )
    assert len({row["reward"] for row in numbers(tmp_path / "a") if "reward" in row}) > 2


def test_another_accumulation_continues_where_no_rollout_is_under_way(checkpoint, tmp_path):
    make(checkpoint, tmp_path, max_steps=1).train()
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    resumed = make(checkpoint, tmp_path, max_steps=2, **halves)
    resumed.train(resume_from_checkpoint=True)
    assert [row["step"] for row in numbers(tmp_path)] == [1, 2] and resumed._step == 4


def test_a_rollout_under_way_is_finished_as_it_began(checkpoint, tmp_path):
    two_steps = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    make(checkpoint, tmp_path, max_steps=1, **two_steps).train()
    other = make(checkpoint, tmp_path, max_steps=2, **{**two_steps, "gradient_accumulation_steps": 1})
    with pytest.raises(ValueError, match=r"rollout under way: continue it with gradient_accumulation_steps=2 as"):
        other.train(resume_from_checkpoint=True)


def test_a_finished_run_takes_no_further_step(checkpoint, tmp_path):
    make(checkpoint, tmp_path, max_steps=3).train()
    weights = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    again = make(checkpoint, tmp_path, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert_equal_weights({n: p for n, p in weights_of(again).items() if n in weights}, weights)


@pytest.fixture
def sealed(tmp_path):
    """Three whole checkpoints made of two files each, written in the order 1, 3, 2."""
    for step in (1, 3, 2):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "deep").mkdir(parents=True)
        (folder / "model").write_bytes(bytes(range(256)) * step)
        (folder / "deep" / "optimizer").write_bytes(b"x" * 100)
        seal(folder)
    return tmp_path


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_what_cannot_be_continued_is_told_with_what_can(tmp_path):
    config = {"model": "a/janus", "ref_model": None, "beta": 0.01}

    def state(processes, **changes):
        (tmp_path / "run_state.json").write_text(
            json.dumps({"world_size": processes, "config": {**config, **changes}})
        )

    with pytest.raises(ValueError, match=r"has no run_state\.json, so it is no checkpoint of a run of this project"):
        check_continuable(tmp_path, 8, True)
    state(8)
    check_continuable(tmp_path, 8, True)
    check_continuable(tmp_path, 4, False)
    anew = f"begin a new run with --model {tmp_path} --ref_model a/janus --resume never"
    with pytest.raises(ValueError) as error:
        check_continuable(tmp_path, 4, True)
    assert str(error.value).endswith(f"and DeepSpeed continues with as many alone, not with 4; start 8, or {anew}")
    state(4, save_only_model=True, ref_model="b/janus")
    with pytest.raises(ValueError) as error:
        check_continuable(tmp_path, 4, True)
    assert str(error.value).endswith(f"no optimizer can continue; {anew.replace('a/janus', 'b/janus')}")
    assert begin_anew("c", {**config, "beta": 0}) == "begin a new run with --model c --resume never"
    assert "stage merge c MERGED" in begin_anew("c", {**config, "use_peft": True})


DAMAGE = {
    "bit flipped": (lambda folder: flip_a_bit(folder / "model"), "is damaged: model no longer has the hash"),
    "truncated": (lambda folder: os.truncate(folder / "model", 100), "is torn: model has 100 of 512 bytes"),
    "grown": (lambda folder: (folder / "model").open("ab").write(b"x"), "is torn: model has 513 of 512 bytes"),
    "file lost": (lambda folder: (folder / "deep" / "optimizer").unlink(), "lacks deep/optimizer"),
    "manifest lost": (lambda folder: (folder / "manifest.json").unlink(), "has no readable manifest.json"),
    "manifest torn": (lambda folder: os.truncate(folder / "manifest.json", 40), "has no readable manifest.json"),
    "manifest of nonsense": (
        lambda folder: (folder / "manifest.json").write_text('{"files": {"model": 3}, "written_at": "x"}'),
        "has no readable manifest.json",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_recognised_named_and_passed_over(sealed, name):
    damage, message = DAMAGE[name]
    assert newest_whole(sealed) == (sealed / "checkpoint-2", {})  # the last one written, not the highest step
    damage(sealed / "checkpoint-2")
    assert defect(sealed / "checkpoint-2").startswith(message)
    found, skipped = newest_whole(sealed)
    assert found == sealed / "checkpoint-3"
    # A manifest that cannot be read leaves the time of the folder to sort by.
    assert {path.name for path in skipped} <= {"checkpoint-2"}


def test_rotation_keeps_whole_checkpoints_and_never_deletes_the_only_one(sealed):
    os.truncate(sealed / "checkpoint-2" / "model", 3)
    rotate(sealed, 1)
    assert sorted(path.name for path in sealed.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert defect(sealed / "checkpoint-3") is None
    rotate(sealed, 0)
    assert (sealed / "checkpoint-3").exists()


def test_rotation_keeps_the_best(sealed):
    rotate(sealed, 1, protected=[sealed / "checkpoint-1"])
    assert sorted(path.name for path in sealed.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_save_total_limit_after_going_back_to_an_older_checkpoint(checkpoint, tmp_path):
    """By step the new checkpoint would be the oldest, and be deleted as soon as it is written."""
    make(checkpoint, tmp_path, max_steps=4).train()
    back = make(checkpoint, tmp_path, max_steps=2, save_total_limit=1)
    back.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-2", {})


def test_the_best_checkpoint_is_recorded_by_its_final_name(checkpoint, tmp_path):
    trainer = make(
        checkpoint,
        tmp_path,
        max_steps=3,
        eval_dataset=dataset(2),
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    trainer.train()
    best = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(best) and defect(best) is None
    assert_equal_weights(load_file(best / "model.safetensors"), {
        name: p for name, p in weights_of(trainer).items() if name != "lm_head.weight"
    })  # fmt: skip


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    """A recipe in a folder of its own, and its command line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "score.py").write_text(
        "def brightness(images, prompts, metadata):\n"
        "    return [sum(image.convert('L').tobytes()) / 255 for image in images]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = {
        "output_dir": "out",
        "model": checkpoint,
        "train_prompts": "prompts.txt",
        "rewards": ["score:brightness"],
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "guidance_scale": 1.0,
        "gradient_checkpointing": False,
        "save_steps": 1,
        "sample_steps": 0,
        "disable_tqdm": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_training_again_continues_from_the_newest_whole_checkpoint(run, capsys, caplog):
    main(["train", "run.yaml", "--max_steps", "2"])
    flip_a_bit(run / "out" / "checkpoint-2" / "model.safetensors")
    main(["train", "run.yaml", "--learning_rate", "0.002", "--logging_steps", "2"])
    told = caplog.text
    assert "checkpoint-2 is damaged: model.safetensors no longer has the hash" in told
    assert "continuing from out/checkpoint-1" in told
    assert "learning_rate: 0.001 -> 0.002 (this changes the maths)" in told
    assert "logging_steps: 1 -> 2 (no result depends on it)" in told
    assert "max_steps: 2 -> 3 (this changes the maths)" in told  # the schedule is linear
    assert "per_device_train_batch_size" not in told
    assert defect(run / "out" / "checkpoint-2") is None and (run / "out" / "checkpoint-3").is_dir()
    assert capsys.readouterr().out.splitlines()[-1] == "saved out"
    resumed = logged(run / "out")
    caplog.clear()
    main(["train", "run.yaml", "--resume", "never"])
    assert "continuing" not in caplog.text
    rates = [{row["step"]: row.get("learning_rate") for row in rows} for rows in (resumed, logged(run / "out"))]
    assert rates[1][2] == pytest.approx(0.001 * 2 / 3)  # the second of three steps
    assert rates[0][2] == pytest.approx(0.002 / 2)  # twice the rate of the second of two steps
    assert [row["step"] for row in logged(run / "out")][:3] == [1, 2, 3]


def test_a_new_run_in_an_old_folder_leaves_nothing_of_the_old_one(run):
    out = run / "out"
    old = ["adapter_config.json", "adapter_model.safetensors", "ema/config.json", "ema/model.safetensors"]
    old += ["samples/step_000009.png", "samples/step_000009_labelled.png", "samples/step_000009.json"]
    old += ["heldout.jsonl", "heldout/step-000050/scores.json", "best/config.json"]
    for name in (*old, "notes.txt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    main(["train", "run.yaml", "--max_steps", "1", "--save_strategy", "no", "--sample_steps", "1"])
    assert [name for name in old if (out / name).exists()] == []
    assert not is_adapter(out) and (out / "model.safetensors").is_file() and (out / "notes.txt").is_file()
    assert read_run(out).sample_steps == [1] and not (out / "ema").exists() and not (out / "best").exists()


def test_a_resumed_run_keeps_the_pictures_up_to_its_step(tmp_path):
    names = [f"step_{step:06d}{end}" for step in (1, 10, 20) for end in (".png", "_labelled.png", ".json")]
    (tmp_path / "samples").mkdir()
    (tmp_path / "best").mkdir()
    for name in names:
        (tmp_path / "samples" / name).touch()
    folder = RunFolder(tmp_path)
    folder.is_resumed = True
    folder.start_metrics(10)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == sorted(names[:6])
    folder.forget_heldout([str(tmp_path / "best")])  # trained from the best policy of the earlier run
    assert (tmp_path / "best").is_dir()


def test_wrong_checkpoints_are_refused_in_one_line(run, capsys):
    main(["train", "run.yaml", "--max_steps", "1"])
    flip_a_bit(run / "out" / "checkpoint-1" / "optimizer.pt")
    refusals = {
        "auto": ("no checkpoint of out is whole", "--resume never to start over"),
        "out/checkpoint-1": ("is damaged: optimizer.pt", "auto for the newest whole one"),
        "out/checkpoint-7": ("resume='out/checkpoint-7' is no folder", "give auto, never"),
    }
    for wish, expected in refusals.items():
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["train", "run.yaml", "--resume", wish])
        err = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2 and err.startswith("stage train: error: ")
        assert all(part in err for part in expected), err


def test_weights_of_another_model_are_refused(checkpoint, tmp_path):
    make(checkpoint, tmp_path, max_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.language_model.layers.9.extra"] = tensors.pop("model.language_model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    seal(folder)
    with pytest.raises(ValueError, match=r"missing 'model.language_model.norm.weight', unknown .*layers.9.extra"):
        make(checkpoint, tmp_path).train(resume_from_checkpoint=True)


def test_a_full_disk_leaves_the_older_checkpoints_and_says_so(checkpoint, tmp_path):
    """Files beyond a size limit fail to be written, as on a full disk."""
    make(checkpoint, tmp_path, max_steps=1).train()
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoint-1").rglob("*") if path.is_file()}
    resumed = make(checkpoint, tmp_path, max_steps=2)
    largest = (tmp_path / "checkpoint-1" / "optimizer.pt").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint-2 could not be written .* untouched are checkpoint-1; free"):
            resumed.train(resume_from_checkpoint=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / ".partial").exists()
    make(checkpoint, tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert newest_whole(tmp_path)[0] == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_and_it_continues(run, number):
    """The whole way, in a process of its own: signal, exit code 0, the printed command, the straight run's weights."""
    command = [sys.executable, "-m", "stage_grpo.cli", "train", "run.yaml", "--max_steps", "40"]
    command += ["--lr_scheduler_type", "constant", "--save_steps", "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = run / "out" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = out.splitlines()
    (saved,) = (run / "out").glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    assert lines[-2] == f"{number.name}: saved out/checkpoint-{step}; continue with" and step < 40
    assert not (run / "out" / "model.safetensors").exists()
    words = lines[-1].split()
    assert words[:2] == ["stage", "train"] and words[-2:] == ["--resume", "auto"]
    to_two_more = ["--max_steps", str(step + 2)]
    main([*words[1:], *to_two_more])
    main(["train", "run.yaml", "--output_dir", "straight", "--lr_scheduler_type", "constant", *to_two_more])
    assert_equal_weights(load_file("out/model.safetensors"), load_file("straight/model.safetensors"))


def test_changes_tell_maths_from_bookkeeping():
    before = {"beta": 0.01, "save_steps": 5, "max_steps": 10, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    now = {**before, "beta": 0.02, "save_steps": 6, "max_steps": 20, "weight_decay": 0.1, "new": 1}
    assert changes(before, now) == {
        MATHS: {"beta": "0.01 -> 0.02", "new": "None -> 1"},
        NO_RESULT: {"max_steps": "10 -> 20", "save_steps": "5 -> 6"},
        NO_EFFECT: {"weight_decay": "0.0 -> 0.1"},
    }
    cosine = {"lr_scheduler_type": "cosine"}
    assert changes({**before, **cosine}, {**now, **cosine})[MATHS]["max_steps"]
    assert not any(changes(before, before).values())


def test_every_key_that_changes_no_number_is_a_key(tmp_path):
    assert config(tmp_path).to_dict().keys() >= NEUTRAL
