"""What a reward may return, how it is built by name, and how TRL sees it."""

import asyncio
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from stage_grpo.config import StageConfig
from stage_grpo.preflight import build_rewards
from stage_grpo.rewards.base import FunctionReward, Reward, RewardResult, as_reward, as_trl_reward
from stage_grpo.rewards.registry import REWARDS, build_reward
from stage_grpo.rewards.side_by_side import RewardThreads
from stage_grpo.shapes.scenes import Scene, SceneObject, render
from stage_grpo.training import _try_rewards
from stage_grpo.types import PromptRow
from stage_grpo.weights import WEIGHTS

IMAGES = [Image.new("RGB", (4, 4), (grey, grey, grey)) for grey in (0, 51, 255)]
PROMPTS = ["a", "b", "c"]
METADATA = [{}, {}, {}]


def grey_level(images, prompts, metadata, *, scale=1.0):
    return [scale * image.getpixel((0, 0))[0] / 255 for image in images]


class Constant(Reward):
    """Returns what the test put into ``returned``."""

    name = "constant"

    def __init__(self, returned):
        super().__init__()
        self.returned = returned

    def compute(self, images, prompts, metadata):
        return self.returned


def scored(returned):
    return Constant(returned).score(IMAGES, PROMPTS, METADATA).scores


def test_function_is_a_reward_named_after_it():
    reward = as_reward(grey_level)
    assert reward.name == "grey_level"
    # 0 / 255, 51 / 255, 255 / 255.
    np.testing.assert_allclose(reward.score(IMAGES, PROMPTS).scores, [0.0, 0.2, 1.0], atol=1e-6)


def test_a_reward_stays_itself_and_other_things_are_refused():
    reward = Constant([1, 2, 3])
    assert as_reward(reward) is reward
    with pytest.raises(TypeError, match="'grey'"):
        as_reward("grey")
    with pytest.raises(TypeError, match="Constant"):
        as_reward(Constant)


@pytest.mark.parametrize(
    "returned",
    [[0, 0.5, 1], (0, 0.5, 1), np.array([0, 0.5, 1], dtype=np.float32), torch.tensor([0, 0.5, 1])],
)
def test_any_sequence_of_numbers_will_do(returned):
    assert scored(returned).dtype == np.float64
    np.testing.assert_allclose(scored(returned), [0, 0.5, 1], atol=1e-6)


def test_none_and_nan_mean_not_scored_and_are_logged(caplog):
    np.testing.assert_equal(scored([None, float("nan"), 2.0]), [np.nan, np.nan, 2.0])
    assert "reward 'constant' could not score 2 of 3 images" in caplog.text


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "returned 2 scores for 3 images"),
        ([1.0, 2.0, float("inf")], "returned inf for image 2"),
        ([-float("inf"), 2.0, 1.0], "returned -inf for image 0"),
        (["1", "2", "3"], "returned '1' for image 0"),
        ([[1], [2], [3]], r"returned \[1\] for image 0"),
        ([1.0, 2.0, {}], "returned {} for image 2"),
        ("123", "returned '123'"),
        (1.0, "returned 1.0"),
        (None, "returned None"),
        (np.zeros((3, 2)), r"returned \[0.0, 0.0\] for image 0"),
        (RewardResult(np.zeros(3), {"n": [1, 2]}), "returned 2 values of detail 'n' for 3 images"),
    ],
)
def test_anything_else_is_an_error_that_names_the_reward(returned, message):
    with pytest.raises(ValueError, match=f"reward 'constant' {message}"):
        scored(returned)


def test_inputs_must_match():
    with pytest.raises(ValueError, match="3 images, 2 prompts and 2 metadata"):
        Constant([1]).score(IMAGES, PROMPTS[:2])


def test_a_class_without_a_name_is_called_by_its_own():
    class Unnamed(Reward):
        def compute(self, images, prompts, metadata):
            return [0.0] * len(images)

    class Another(Constant):
        pass

    assert (Unnamed().name, Another([]).name, Constant([]).name) == ("Unnamed", "Another", "constant")


def test_two_rewards_of_one_name_are_refused():
    same, other = Constant([1, 2, 3]), Constant([4, 5, 6])
    RewardThreads([same, grey_level, same], ahead=False)  # one object twice is one curve
    with pytest.raises(ValueError, match=r"several rewards are called 'constant', .* give each a name of its own"):
        RewardThreads([same, grey_level, other], ahead=False)
    with pytest.raises(ValueError, match="several rewards are called '<lambda>'"):
        RewardThreads([lambda images, prompts, metadata: [], lambda *given: []], ahead=False)
    with pytest.raises(ValueError, match="several rewards are called 'grey_level'"):
        build_rewards(StageConfig("unused", rewards=[f"{__name__}:grey_level"] * 2))


def test_functions_that_do_not_take_the_three_are_refused_before_any_work():
    for function, why in [
        (lambda images, prompts, metadata, threshold: [], "missing a required argument: 'threshold'"),
        (lambda images, prompts: [], "too many positional arguments"),
        (lambda prompts, completions, metadata, *, images: [], "missing a required argument: 'images'"),
    ]:
        with pytest.raises(ValueError, match=f"'<lambda>' cannot be called as f.*: {why}; let it take these three"):
            as_reward(function)


def any_options(images, prompts, metadata, **options):
    return [options["level"]] * len(images)


def needs_an_option(images, prompts, metadata, level):
    return [level] * len(images)


def test_functions_that_need_or_take_any_options_get_them():
    for function in (any_options, needs_an_option):
        reward = build_reward(f"{__name__}:{function.__name__}", {"level": 0.5})
        assert reward.score(IMAGES, PROMPTS).scores.tolist() == [0.5] * 3
    with pytest.raises(ValueError, match=r"'needs_an_option' cannot be called .*missing a required argument: 'level'"):
        build_reward(f"{__name__}:needs_an_option")


def test_every_row_is_checked_before_a_run():
    def row(prompt, shape):
        return PromptRow(prompt, {"tag": "single_object", "include": [{"class": "circle", shape: 1}]})

    rows = [row("a", "count"), row("b", "size"), row("c", "count")]
    _try_rewards([build_reward("shapes")], rows[::2], 8)
    with pytest.raises(ValueError, match=r"reward 'shapes' cannot score the prompt 'b': .*size"):
        _try_rewards([build_reward("shapes"), Constant([0.0])], rows, 8)


def test_trl_sees_none_for_not_scored_and_reads_json_metadata():
    seen = {}

    def reader(images, prompts, metadata):
        seen.update(images=images, prompts=prompts, metadata=metadata)
        return [0.5, None, float("nan")]

    function = as_trl_reward(reader)
    assert function.__name__ == "reader"
    scores = function(
        prompts=PROMPTS,
        completions=["x"] * 3,
        completion_ids=[[1]] * 3,
        generated_images=IMAGES,
        metadata=[json.dumps({"tag": "colors"}), {"tag": "counting"}, None],
        trainer_state=None,
    )
    assert scores == [0.5, None, None]
    assert seen == {
        "images": IMAGES,
        "prompts": PROMPTS,
        "metadata": [{"tag": "colors"}, {"tag": "counting"}, {}],
    }


def test_trl_hooks_receive_details():
    details = {"correct": [True, False, True], "reasons": [["a", "b"], [], ["c"]], "some": [1, None, 4]}
    columns, metrics = {}, {}
    as_trl_reward(Constant(RewardResult(np.zeros(3), details)))(
        prompts=PROMPTS,
        generated_images=IMAGES,
        log_extra=columns.__setitem__,
        log_metric=metrics.__setitem__,
    )
    assert columns["constant/reasons"] == ["a; b", "", "c"]
    assert columns["constant/correct"] == [True, False, True]
    # (1 + 0 + 1) / 3 and (1 + 4) / 2; text has no mean.
    assert metrics == pytest.approx({"rewards/constant/correct": 2 / 3, "rewards/constant/some": 2.5}, abs=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "'constant' got no images; .*generated_images"),
        ({"generated_images": IMAGES, "metadata": ["{", "{}", "{}"]}, "'{', which is no JSON"),
        ({"generated_images": IMAGES, "metadata": ["[1]", "{}", "{}"]}, r"metadata \[1\]"),
    ],
)
def test_trl_misuse_is_explained(kwargs, message):
    with pytest.raises(ValueError, match=message):
        as_trl_reward(Constant([0, 0, 0]))(prompts=PROMPTS, **kwargs)


def test_registry_builds_every_name_and_describes_it(monkeypatch):
    monkeypatch.setattr("stage_grpo.rewards.maniqa.ManiqaReward.packages", ())  # the one whose extra is not installed
    for name, entry in REWARDS.items():
        reward = build_reward(name, {"url": "http://127.0.0.1:1"} if name == "deqa" else None)
        assert reward.name == name
        assert entry.description and entry.range and entry.licence
        assert set(reward.requirements) <= set(WEIGHTS)
        assert not reward.packages or reward.extra


def test_every_name_is_in_the_documents_table():
    text = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)) >= set(REWARDS)


def test_building_every_reward_loads_no_model_and_no_package_of_its_own():
    code = (
        "import sys\n"
        "from stage_grpo.rewards.registry import REWARDS, build_reward\n"
        "for name in REWARDS:\n"
        "    if name not in ('deqa', 'maniqa'):\n"
        "        build_reward(name)\n"
        "heavy = {'transformers', 'trl', 'rapidocr', 'onnxruntime', 'cv2', 'pyiqa', 'starlette', 'httpx2'}\n"
        "sys.exit(','.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("stage_grpo.rewards.maniqa.ManiqaReward.packages", ("no_such_package",))
    with pytest.raises(ValueError, match=r"'maniqa' needs no_such_package, .*pip install 'stage-grpo\[iqa\]'"):
        build_reward("maniqa")


def test_what_raises_is_named():
    def exploding(images, prompts, metadata):
        raise KeyError("colour")

    with pytest.raises(KeyError) as caught:
        as_reward(exploding).score(IMAGES, PROMPTS)
    assert caught.value.__notes__ == ["raised by reward 'exploding'"]


def test_asynchronous_rewards_wait_together():
    both = threading.Barrier(2, timeout=10)  # passed only by two at once

    class Waiting(Constant):
        asynchronous = True

        def compute(self, images, prompts, metadata):
            both.wait()
            return self.returned

    async def ask():
        functions = [as_trl_reward(Waiting([n, None, n])) for n in (1, 2)]
        return await asyncio.gather(*(f(prompts=PROMPTS, generated_images=IMAGES) for f in functions))

    assert asyncio.run(ask()) == [[1.0, None, 1.0], [2.0, None, 2.0]]


def test_registry_builds_functions_with_options():
    reward = build_reward(f"{__name__}:grey_level", {"scale": 10.0})
    assert isinstance(reward, FunctionReward)
    np.testing.assert_allclose(reward.score(IMAGES, PROMPTS).scores, [0.0, 2.0, 10.0], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shape", None, "unknown reward 'shape'; known are .*shapes"),
        ("shapes", {"strikt": True}, "'shapes' has no option 'strikt'; known are strict"),
        ("shapes", {"strict": "yes"}, "'shapes' rejects its options strict: "),
        ("no.such.module:f", None, "'no.such.module:f' cannot be imported"),
        ("stage_grpo.types:nothing", None, "'stage_grpo.types:nothing' cannot be imported"),
        ("stage_grpo.types:Box", None, "Box"),
        (":f", None, "':f' cannot be imported"),
        (f"{__name__}:grey_level", {"size": 1}, "has no option 'size'; known are scale"),
    ],
)
def test_registry_errors_name_what_is_wrong(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_reward(name, options)


def test_no_error_shows_a_token():
    with pytest.raises(ValueError, match="'x' rejects its options url, token, timeout: timeout=0 must be") as raised:
        build_reward("x", {"url": "http://host:1", "token": "SECRET", "timeout": 0})
    assert "SECRET" not in str(raised.value)


def test_shapes_reward_graded_and_strict():
    red_circle = SceneObject("circle", "red", "large", 16.0, 16.0)
    blue_square = SceneObject("square", "blue", "small", 32.0, 32.0)
    images = [render(Scene((red_circle,))), render(Scene((red_circle, blue_square)))]
    wanted = {
        "tag": "color_attr",
        "include": [
            {"class": "circle", "count": 1, "color": "red"},
            {"class": "square", "count": 1, "color": "green"},
        ],
    }
    graded = build_reward("shapes").score(images, ["", ""], [wanted, wanted])
    # Terms of the first: count 1, colour 1, count 0, colour 0; of the second: 1, 1, 1, 0.
    np.testing.assert_allclose(graded.scores, [2 / 4, 3 / 4], atol=1e-6)
    assert graded.details["correct"] == [0, 0]
    assert graded.details["reasons"] == [
        ["expected at least 1 square, found 0"],
        ["expected 1 green square, found 0"],
    ]
    satisfied = {"include": [{"class": "circle", "count": 1, "color": "red"}]}
    strict = build_reward("shapes", {"strict": True})
    assert strict.score(images, ["", ""], [satisfied, wanted]).scores.tolist() == [1.0, 0.0]


def test_shapes_reward_refuses_foreign_metadata():
    with pytest.raises(ValueError, match="no 'include' clause"):
        build_reward("shapes").score(IMAGES[:1], ["a photo of a cat"], [{}])


def test_the_contract_loads_no_model_library():
    code = (
        "import sys, stage_grpo.rewards.registry as registry; registry.build_reward('shapes');"
        "sys.exit(','.join({'torch', 'transformers', 'trl'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_document_runs_as_written(monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "adding_a_reward.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.setattr("stage_grpo.rewards.registry.REWARDS", dict(REWARDS))
    module = ModuleType("documented_reward")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks:
        exec(compile(block, "adding_a_reward.md", "exec"), module.__dict__)
    redness = module.build_reward("redness", {"threshold": 0.7}).score(IMAGES, PROMPTS)
    # Red channels of 0, 51 / 255 = 0.2 and 1 against 0.7.
    assert redness.scores.tolist() == [0.0, 0.0, 1.0]
    np.testing.assert_allclose(redness.details["mean_red"], [0.0, 0.2, 1.0], atol=1e-6)
    with pytest.raises(ValueError, match="threshold=2 is outside"):
        module.build_reward("redness", {"threshold": 2})
