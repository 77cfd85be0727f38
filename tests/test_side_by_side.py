"""Rewards in threads beside the reference's forward: when they run, and that nothing but time tells."""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image

from stage_grpo.graceful_stop import GracefulStop
from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.rewards.failures import RewardFailedError
from stage_grpo.rewards.side_by_side import RewardThreads
from test_trainer import brightness, dataset, logged, trainer_for

IMAGES = [Image.new("RGB", (2, 2), (grey, grey, grey)) for grey in (0, 51, 255)]
PROMPTS = ["a", "b", "c"]
ROWS = [{"metadata": json.dumps({"row": i})} for i in range(3)]
PATIENCE = 20.0
"""Seconds after which what should have happened at once is taken not to happen."""
TIMES = re.compile("seconds/|_per_second|runtime|step_time|memory/")
SMALL = {"preset": "grpo", "per_device_train_batch_size": 4, "num_generations": 2, "max_steps": 2}


class Shade(Reward):
    """The grey level of each image, computed by whatever function the test gives."""

    def __init__(self, name="shade", act=lambda: None):
        super().__init__()
        self.name, self.act, self.threads, self.seen = name, act, [], []

    def compute(self, images, prompts, metadata):
        self.threads.append(threading.current_thread())
        self.seen.append((list(map(id, images)), prompts, metadata))
        self.act()
        return [image.getpixel((0, 0))[0] / 255 for image in images]


class Waiting(Shade):
    asynchronous = True


class Patchy(Reward):
    """Fails on some samples, with details, a warning and the gradient mode among them."""

    name = "patchy"

    def compute(self, images, prompts, metadata):
        scores = [1000 * score % 1 for score in brightness(images, prompts, metadata)]
        failed = [i % 5 == 3 for i in range(len(images))]
        reasons = [f"image {i} is broken" if bad else None for i, bad in enumerate(failed)]
        details = {"reason": reasons, "gradients": [float(torch.is_grad_enabled())] * len(images)}
        return RewardResult(np.where(failed, math.nan, scores), details)


class Patient(Patchy):
    name = "patient"
    asynchronous = True

    def compute(self, images, prompts, metadata):
        return [0.1 * i + 0.01 * len(prompt) for i, prompt in enumerate(prompts)]


def ask(threads, place):
    """As TRL does, of a reward that is not asynchronous."""
    cells = [row["metadata"] for row in ROWS]
    return threads.functions[place](prompts=PROMPTS, generated_images=IMAGES, metadata=cells)


def step(threads, between=lambda: None):
    """One batch: images are there, the reference runs, TRL asks for the rewards in turn."""
    with threads.batch(ROWS):
        threads.start(IMAGES, PROMPTS)
        between()
        return [ask(threads, place) for place in range(len(threads.functions))]


# ---- nothing but time tells -----------------------------------------------------------------------------------------


def untimed(rows):
    return [{name: row[name] for name in row if not TIMES.search(name)} for row in rows]


def run(checkpoint, folder, caplog, **changes):
    """Logged rows, warnings and weights of three steps and an evaluation."""
    caplog.clear()
    rewards = [Patchy(), brightness, Patient()]
    evaluation = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "per_device_eval_batch_size": 4,
        "num_generations_eval": 2,
    }
    changes |= {**SMALL, **evaluation, "preset": "paper", "max_steps": 3, "reward_weights": [1.0, 0.5, 0.2]}
    trainer = trainer_for(checkpoint, folder, rewards, eval_dataset=dataset(2), **changes)
    assert trainer.reward_threads.ahead == bool(changes.get("overlap_rewards")), "by default not on a CPU"
    trainer.train()
    warned = [record.getMessage() for record in caplog.records if "could not score" in record.getMessage()]
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    return logged(folder), warned, weights


def test_a_run_with_overlap_is_the_run_without(checkpoint, tmp_path, caplog):
    rows, warned, weights = run(checkpoint, tmp_path / "on", caplog, overlap_rewards=True)
    plain_rows, plain_warned, plain_weights = run(checkpoint, tmp_path / "off", caplog)
    assert untimed(rows) == untimed(plain_rows)
    assert warned == plain_warned and len(warned) == 4
    assert all(torch.equal(weights[name], plain_weights[name]) for name in plain_weights)
    steps, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "eval_reward" in row]
    assert len(steps) == 3 and len(evaluations) == 1
    assert all(row["reward_failures"] == row["rewards/patchy/gradients"] == 1 for row in steps)
    assert all(row["seconds/reward_work"] > 0 for row in steps)
    assert all(row["eval_reward_failures"] == 1 and row["eval_seconds/reward_work"] > 0 for row in evaluations)
    assert not any(name.endswith("reward_work") for row in plain_rows for name in row)


# ---- beside one another, and beside the reference -------------------------------------------------------------------


def test_rewards_run_while_the_reference_does(checkpoint, tmp_path):
    """In the second step three rewards meet the reference's forward, which waits for them, as they for it."""
    meeting, steps = threading.Barrier(4, timeout=PATIENCE), []

    def meet():
        if steps:
            meeting.wait()

    rewards = [Shade("one", meet), Shade("two", meet), Waiting("three", meet)]
    trainer = trainer_for(checkpoint, tmp_path, rewards, overlap_rewards=True, **SMALL)
    generate, score = trainer._generate_and_score_completions, trainer._get_per_token_logps_and_entropies

    def score_spied(*args, **kwargs):
        if not torch.is_grad_enabled():
            meet()
        return score(*args, **kwargs)

    def generate_spied(rows):
        output = generate(rows)
        steps.append(None)
        return output

    trainer._get_per_token_logps_and_entropies, trainer._generate_and_score_completions = score_spied, generate_spied
    trainer.train()
    assert trainer.state.global_step == 2 and not meeting.broken


def test_a_reward_begins_ahead_once_it_has_scored_something():
    """The first batch of all, and those before it found anything to say, may load its models: they stay here."""
    shade, hidden = Shade(), Shade("hidden")
    hidden.compute = lambda images, prompts, metadata: (
        hidden.threads.append(threading.current_thread()) or [None if len(hidden.threads) < 3 else 1.0] * len(images)
    )
    threads = RewardThreads([shade, hidden], ahead=True)
    results = [step(threads) for _ in range(4)]
    here = threading.current_thread()
    assert [thread is here for thread in shade.threads] == [True, False, False, False]
    assert [thread is here for thread in hidden.threads] == [True, True, True, False]
    assert len({*shade.threads[1:]}) == 1, "a reward keeps its thread"
    assert shade.seen == [(list(map(id, IMAGES)), PROMPTS, [{"row": i} for i in range(3)])] * 4
    assert [result[0] for result in results] == [[0.0, 0.2, 1.0]] * 4
    assert [result[1] for result in results] == [[None] * 3] * 2 + [[1.0] * 3] * 2


def test_no_models_are_loaded_beside_a_reward_that_computes():
    """What may load waits for those in threads, though it is asked first."""
    order = []
    late = Shade("late", lambda: order.append("loads"))
    slow = Shade("slow", lambda: (time.sleep(0.2), order.append("computed")))
    threads = RewardThreads([late, slow], ahead=True)
    step(threads)
    threads._loaded.discard(0)
    order.clear()
    step(threads)
    assert order == ["computed", "loads"]


def test_scores_are_of_the_images_that_they_are_given_for():
    threads = RewardThreads([Shade()], ahead=True)
    step(threads)
    with threads.batch(ROWS):
        threads.start(IMAGES, PROMPTS)
        with pytest.raises(AssertionError, match="TRL no longer hands rewards the images of the rollout"):
            threads.functions[0](prompts=PROMPTS, generated_images=IMAGES[::-1])


def test_without_overlap_everything_happens_where_it_is_asked_for():
    reward = Shade()
    threads = RewardThreads([reward], ahead=False)
    for _ in range(2):
        step(threads, between=lambda: time.sleep(0.01))
    assert {*reward.threads} == {threading.current_thread()}


def shared_one(images, prompts, metadata):
    return shared_two(images, prompts, metadata)


BUSY = threading.Lock()


def shared_two(images, prompts, metadata):
    """Two at once would raise."""
    assert BUSY.acquire(blocking=False)
    time.sleep(0.02)
    BUSY.release()
    return [float(len(prompt)) for prompt in prompts]


def test_functions_of_one_module_and_one_object_given_twice_take_turns():
    order = []
    same = Shade("same", lambda: order.append("begins") or time.sleep(0.02) or order.append("ends"))
    threads = RewardThreads([shared_one, same, shared_two, same], ahead=True)
    for _ in range(3):
        assert step(threads) == [[1.0] * 3, [0.0, 0.2, 1.0]] * 2
    assert order == ["begins", "ends"] * 6
    assert len({*same.threads[2:]}) == 1


def test_work_is_counted_apart_from_waiting():
    """Three rewards of 0.2 seconds each: work of 0.6, of which the batch waits for less than half."""
    threads = RewardThreads([Shade(str(i), lambda: time.sleep(0.2)) for i in range(3)], ahead=True)
    step(threads)
    assert threads.work_seconds >= 0.6
    waited = []
    with threads.batch(ROWS):
        threads.start(IMAGES, PROMPTS)
        time.sleep(0.2)  # the reference
        start = time.perf_counter()
        for place in range(3):
            ask(threads, place)
        waited.append(time.perf_counter() - start)
    assert threads.work_seconds >= 0.6 and waited[0] < 0.3
    with threads.batch(ROWS):
        assert threads.work_seconds == 0


# ---- what a reward sees ---------------------------------------------------------------------------------------------


def modes():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_num_threads(),
        torch.tensor([1.0]).mul(torch.ones(1, requires_grad=True)).requires_grad,
    )


@pytest.mark.parametrize("entered", [[], [torch.no_grad], [torch.inference_mode], "cast", ["cast", torch.no_grad]])
def test_a_reward_sees_the_modes_of_the_thread_that_asks(entered):
    seen = []
    reward = Shade(act=lambda: seen.append(modes()))
    threads = RewardThreads([reward], ahead=True)
    step(threads)
    with ExitStack() as stack:
        for mode in ["cast"] if entered == "cast" else entered:
            stack.enter_context(torch.autocast("cpu", torch.float16) if mode == "cast" else mode())
        expected = modes()
        step(threads)
    assert seen[1] == expected and reward.threads[1] is not threading.current_thread()


# ---- errors, signals, the end ---------------------------------------------------------------------------------------


def fail_later(error):
    calls = []

    def fail():
        calls.append(None)
        if len(calls) == 2:
            raise error

    return fail


def test_an_exception_in_the_second_step_stops_the_run(checkpoint, tmp_path):
    """As in turn, except that the other reward has done its work; it is finished when the error comes."""
    slow = Shade("slow", lambda: time.sleep(0.1))
    rewards = [Shade("exploding", fail_later(KeyError("colour"))), slow]
    trainer = trainer_for(checkpoint, tmp_path, rewards, overlap_rewards=True, **SMALL)
    with pytest.raises(KeyError, match="colour") as caught:
        trainer.train()
    assert caught.value.__notes__ == ["raised by reward 'exploding'"]
    assert trainer.state.global_step == 1 and len(logged(tmp_path)) == 1
    assert len(slow.threads) == 2


@pytest.mark.parametrize("ahead", [True, False])
def test_a_reward_that_fails_on_everything_three_times_in_a_row_stops_the_run(ahead, caplog):
    caplog.set_level(logging.WARNING)
    dying = Shade("dying")
    dying.compute = lambda *_: dying.threads.append(None) or [None if len(dying.threads) in (2, 4, 5, 6) else 1.0] * 3
    threads = RewardThreads([dying], ahead)
    for _ in range(5):
        step(threads)
    with pytest.raises(RewardFailedError, match="'dying' could not score a single image in 3 steps in a row"):
        step(threads)
    assert len(dying.threads) == 6
    said = [record.getMessage().split(":")[0] for record in caplog.records]
    failed = "reward 'dying' could not score 3 of 3 images"
    counted = ["reward 'dying' failed on every image, step 1 of 3 in a row after which the run stops"]
    assert said == [failed, *counted, failed, *counted, failed, counted[0].replace("step 1", "step 2"), failed]


def test_after_a_batch_nothing_is_at_work_whatever_ended_it():
    working = threading.Event()
    done = []
    slow = Shade("slow", lambda: working.set() or time.sleep(0.2) or done.append("slow"))
    queued = Shade("queued", lambda: done.append("queued"))
    slow.shares = queued.shares = "model"
    threads = RewardThreads([slow, queued], ahead=True)
    step(threads)
    done.clear()
    working.clear()

    def out_of_memory():
        assert working.wait(PATIENCE)
        raise MemoryError("reference")

    with pytest.raises(MemoryError, match="reference"):
        step(threads, between=out_of_memory)
    assert done == ["slow"], "one that had not begun is not begun"
    assert step(threads) == [[0.0, 0.2, 1.0]] * 2


def test_the_sequence_of_errors_and_warnings_is_that_of_rewards_in_turn(caplog):
    """The second to fail is the second to be heard of, even if it is the first in time."""
    caplog.set_level(logging.WARNING)

    def said(ahead):
        caplog.clear()
        early, late = Shade("early", fail_later(KeyError("early"))), Shade("late", fail_later(KeyError("late")))
        early.act, late.act = (lambda act=early.act: time.sleep(0.05) or act()), late.act
        slow, quick = Shade("slow"), Shade("quick")
        slow.compute = lambda images, prompts, metadata: time.sleep(0.05) or [1.0, None, None]
        quick.compute = lambda images, prompts, metadata: [1.0, 1.0, None]
        threads = RewardThreads([slow, quick, early, late], ahead=ahead)
        step(threads)
        with pytest.raises(KeyError) as caught:
            step(threads)
        return str(caught.value), [record.getMessage() for record in caplog.records]

    assert said(True) == said(False)
    error, warnings = said(True)
    assert error == "'early'" and [text.split("'")[1] for text in warnings] == ["slow", "quick"] * 2


def test_a_signal_is_heard_while_a_reward_is_waited_for():
    with GracefulStop() as stop:
        told = []

        def wait_for_signal():
            if told:
                end = time.monotonic() + PATIENCE
                while stop.received is None and time.monotonic() < end:
                    time.sleep(0.01)
                told.append(stop.received)

        threads = RewardThreads([Shade(act=wait_for_signal)], ahead=True)
        step(threads)
        told.append("ready")
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        assert step(threads) == [[0.0, 0.2, 1.0]]
    assert told == ["ready", "SIGTERM"]


def test_a_process_ends_with_its_rewards_idle_or_at_work():
    """An error ends it as soon as the running reward is through, and what waits behind that is not begun."""
    program = """
import time
from stage_grpo.rewards.side_by_side import RewardThreads

def quick(images, prompts, metadata):
    return [1.0]

def slow(images, prompts, metadata):
    time.sleep(0.3)
    return [1.0]

threads = RewardThreads([quick, slow], ahead=True)
for step in range(2):
    with threads.batch([{}]):
        threads.start([None], [""])
        if step:
            print(time.time(), flush=True)
            raise SystemExit(7)
        for function in threads.functions:
            function(prompts=[""], generated_images=[None])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (7, "")
    assert time.time() - float(done.stdout) < 5
