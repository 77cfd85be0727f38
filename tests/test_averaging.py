"""Averages of weights: the arithmetic, swapping in and out, files, and the same with sharded parameters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback, TrainingArguments

from averaging_worker import Net, alone, assert_equal, data, loss_of, optimizer_of
from stage_grpo.averaging import AverageCallback, WeightAverage

WORKER = Path(__file__).with_name("averaging_worker.py")


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(model, optimizer, steps):
    for step in steps:
        loss_of(model(data(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


@pytest.fixture
def averaged():
    """A network after three steps, and its average."""
    model = Net()
    average = WeightAverage(model, 0.9)
    for _ in train(model, optimizer_of(model), range(3)):
        average.update()
    return model, average


def test_the_first_updates_worked_by_hand():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, 0.999)
    assert average.averages["weight"].item() == 1.0
    for value, decay, expected in ((2.0, 2 / 11, 20 / 11), (3.0, 3 / 12, 0.25 * 20 / 11 + 2.25)):
        assert average.next_decay == pytest.approx(decay, abs=1e-12)
        model.weight.data.fill_(value)
        average.update()
        assert average.averages["weight"].item() == pytest.approx(expected, abs=1e-6)


def test_updates_equal_those_of_torch():
    """A decay below 2/11 is constant from the first update on."""
    model = Net()
    average = WeightAverage(model, 0.15)
    other = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.15))
    other.update_parameters(model)  # the first call copies the weights
    for _ in train(model, optimizer_of(model), range(10)):
        average.update()
        other.update_parameters(model)
    expected = {name: p for name, p in other.module.named_parameters() if p.requires_grad}
    assert average.averages.keys() == expected.keys() and "frozen.weight" not in expected
    for name, value in expected.items():
        torch.testing.assert_close(average.averages[name], value, atol=1e-6, rtol=0)


def test_updates_equal_the_written_out_sum_in_float64():
    """The n-th weights count (1 - d_n) times the product of all later decays."""
    model = Net()
    average = WeightAverage(model, 0.5)
    history = [model.first.weight.detach().double()]
    for _ in train(model, optimizer_of(model), range(20)):
        average.update()
        history.append(model.first.weight.detach().double())
    decays = [0.0] + [min(0.5, (1 + n) / (10 + n)) for n in range(1, 21)]
    expected = torch.zeros_like(history[0])
    for n, weights in enumerate(history):
        later = torch.tensor(decays[n + 1 :], dtype=torch.float64).prod()
        expected += (1 - decays[n]) * later * weights
    torch.testing.assert_close(average.averages["first.weight"].double(), expected, atol=1e-6, rtol=0)


def test_weights_in_bfloat16_are_averaged_in_float32():
    """A tenth of the step between neighbouring bfloat16 numbers is kept, and rounded where the model holds it."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, 0.9)
    average.num_updates = 1000
    model.weight.data.fill_(1.0078125)
    average.update()
    value = average.averages["weight"]
    assert value.dtype == torch.float32 and value.item() == pytest.approx(1.00078125, abs=1e-7)
    with average.swapped():
        assert model.weight.dtype == torch.bfloat16 and model.weight.item() == 1.0
    assert model.weight.item() == 1.0078125


def test_the_model_holds_the_averages_inside_and_its_own_weights_after(averaged):
    model, average = averaged
    own, averages = weights_of(model), {name: value.clone() for name, value in average.averages.items()}
    with average.swapped():
        inside = weights_of(model)
        assert_equal({name: inside[name] for name in averages}, averages)
        assert torch.equal(inside["frozen.weight"], own["frozen.weight"])
        assert not torch.equal(inside["first.weight"], own["first.weight"])
    assert_equal(weights_of(model), own)
    assert_equal(average.averages, averages)


def test_own_weights_come_back_after_an_exception(averaged):
    model, average = averaged
    own = weights_of(model)
    with pytest.raises(KeyboardInterrupt), average.swapped():
        model.first.weight.data.zero_()
        raise KeyboardInterrupt
    assert_equal(weights_of(model), own)
    with average.swapped():
        assert torch.equal(model.first.weight, average.averages["first.weight"])


def test_training_after_a_swap_goes_on_as_without():
    runs = []
    for swap in (False, True):
        model = Net()
        average = WeightAverage(model, 0.9)
        for step in train(model, optimizer_of(model), range(6)):
            average.update()
            if swap and step == 2:
                with average.swapped(), torch.no_grad():
                    model(data(0))
        runs.append(weights_of(model) | {f"average.{name}": value for name, value in average.averages.items()})
    assert_equal(*runs)


def test_averages_are_not_averaged_into_themselves(averaged):
    _, average = averaged
    with average.swapped():
        with pytest.raises(RuntimeError, match=r"update\(\) inside swapped"):
            average.update()
        with pytest.raises(RuntimeError, match=r"swapped\(\) inside swapped"), average.swapped():
            pass
    average.update()


def test_saved_averages_continue_exactly(averaged, tmp_path):
    model, average = averaged
    average.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["average_00000_of_00001.safetensors"]
    again = WeightAverage(model, 0.9)
    again.load(tmp_path)
    assert again.num_updates == 3
    model.first.weight.data.add_(1.0)
    average.update()
    again.update()
    assert_equal(again.averages, average.averages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("norm.bias"), "lacks the tensor 'norm.bias'"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "holds the tensor 'extra'"),
        (lambda tensors: tensors.update({"last.bias": torch.zeros(2)}), r"'last.bias' with shape \(2,\) instead of"),
    ],
)
def test_averages_of_another_model_are_refused_by_name(averaged, tmp_path, change, message):
    _, average = averaged
    tensors = {name: value + 1 for name, value in average.averages.items()}
    change(tensors)
    save_file(tensors, tmp_path / "average_00000_of_00001.safetensors", {"num_updates": "9"})
    before = {name: value.clone() for name, value in average.averages.items()}
    with pytest.raises(ValueError, match=message):
        average.load(tmp_path)
    assert_equal(average.averages, before)
    assert average.num_updates == 3


def test_missing_foreign_and_torn_files_are_refused(averaged, tmp_path):
    _, average = averaged
    file = tmp_path / "average_00000_of_00001.safetensors"
    with pytest.raises(ValueError, match=r"holds no average_00000_of_00001\.safetensors but no averages"):
        average.load(tmp_path)
    other = tmp_path / "average_00000_of_00002.safetensors"
    other.touch()
    with pytest.raises(ValueError, match=r"but \['average_00000_of_00002.safetensors'\]; continue with the number"):
        average.load(tmp_path)
    save_file(average.averages, file)
    with pytest.raises(ValueError, match=r"holds tensors, but no averages"):
        average.load(tmp_path)
    average.save(tmp_path)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{file.name} is torn"):
        average.load(tmp_path)


def test_what_averages_nothing_is_refused():
    for decay in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match=f"decay={decay}"):
            WeightAverage(Net(), decay)
    with pytest.raises(ValueError, match="no trainable parameter"):
        WeightAverage(Net().requires_grad_(False), 0.9)


class Regression(Net):
    """Takes and returns what transformers.Trainer hands and wants."""

    def forward(self, x, labels):
        output = super().forward(x)
        return {"loss": (output[:, 0] - labels).square().mean(), "logits": output}


class Recorder(TrainerCallback):
    """The weights after each step, in the order in which they came, and the average before evaluating."""

    def __init__(self, callback):
        self.callback, self.history, self.evaluated = callback, [], []

    def on_train_begin(self, args, state, control, model=None, **_):
        self.history.append(model.first.weight.detach().clone())

    on_step_end = on_train_begin

    def on_evaluate(self, args, state, control, **_):
        self.evaluated.append(self.callback.average.num_updates)


def trainer(folder, callback, **changes):
    rows = [{"x": row, "labels": row.sum()} for row in torch.randn(24, 4, generator=torch.Generator().manual_seed(0))]
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=0.05,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        **{"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, **changes},
    )
    recorder = Recorder(callback)
    return Trainer(Regression(), args, train_dataset=rows, eval_dataset=rows, callbacks=[recorder, callback]), recorder


def test_the_callback_updates_once_an_optimizer_step_before_evaluating(tmp_path):
    callback = AverageCallback(0.9)
    training, recorder = trainer(tmp_path, callback)
    training.train()
    expected = recorder.history[0]
    for n, weights in enumerate(recorder.history[1:], start=1):
        expected = expected.lerp(weights, 1 - min(0.9, (1 + n) / (10 + n)))
    assert len(recorder.history) == 5 and callback.average.num_updates == 4 and recorder.evaluated == [2, 4]
    torch.testing.assert_close(callback.average.averages["first.weight"], expected, atol=1e-6, rtol=0)
    with callback.swapped():
        assert torch.equal(training.model.first.weight, callback.average.averages["first.weight"])
    assert torch.equal(training.model.first.weight, recorder.history[-1])


def test_the_callback_continues_from_a_saved_average(tmp_path):
    straight = AverageCallback(0.9)
    trainer(tmp_path / "a", straight)[0].train()
    half = AverageCallback(0.9)
    training, _ = trainer(tmp_path / "b", half, lr_scheduler_type="linear")

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                half.average.save(tmp_path / "average")
                control.should_save = control.should_training_stop = True

    training.add_callback(Stop())
    training.train()
    resumed = AverageCallback(0.9, resume_from=tmp_path / "average")
    training, _ = trainer(tmp_path / "b", resumed)
    training.train(resume_from_checkpoint=True)
    assert resumed.average.num_updates == 4
    assert_equal(resumed.average.averages, straight.average.averages)


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_two_processes_with_sharded_weights_average_as_one(tmp_path, kind):
    """Beyond what the worker itself asserts: see ``averaging_worker.run``."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(WORKER), kind, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results, expected = load_file(tmp_path / "results.safetensors"), alone()
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, atol=1e-6, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
    shards = [load_file(tmp_path / "average" / f"average_{rank:05d}_of_00002.safetensors") for rank in (0, 1)]
    sizes = [shard["first.weight"].numel() for shard in shards]
    assert sum(sizes) == 30 and max(sizes) < 30
