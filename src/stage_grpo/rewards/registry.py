"""The table of rewards by name. A reward's module is imported when the reward is first built, not before."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any

from stage_grpo.plug_ins import check_option_names, load_target
from stage_grpo.rewards.base import FunctionReward, Reward
from stage_grpo.rewards.whole_models import whole_models
from stage_grpo.weights import cache_folder, folder, is_present


@dataclass(frozen=True)
class RewardEntry:
    """One line of the table.

    Attributes:
        target: where the class is, ``module:Class``.
        description: what it measures.
        range: its values.
        licence: licence of the original's code. Nothing of it is copied; the weights have licences of their own.
    """

    target: str
    description: str
    range: str
    licence: str = "not established"


REWARDS: dict[str, RewardEntry] = {
    "shapes": RewardEntry(
        "stage_grpo.rewards.shapes:ShapesReward",
        "GenEval's rules on the embedded shapes world",
        "[0, 1]",
        "Apache-2.0",
    ),
    "geneval": RewardEntry(
        "stage_grpo.rewards.geneval_reward:GenevalReward",
        "GenEval's rules: objects by Mask2Former, colours by CLIP",
        "[0, 1]",
        "MIT",
    ),
    "hps": RewardEntry(
        "stage_grpo.rewards.clip_rewards:HpsReward",
        "human preference (HPS v2.1), cosine of image and prompt",
        "[-1, 1], usually 0.2 to 0.35",
        "Apache-2.0",
    ),
    "clip": RewardEntry(
        "stage_grpo.rewards.clip_rewards:ClipReward",
        "fit of image and prompt, CLIP's cosine",
        "[-1, 1]",
        "MIT",
    ),
    "pickscore": RewardEntry(
        "stage_grpo.rewards.clip_rewards:PickscoreReward",
        "human preference (PickScore), scaled cosine",
        "usually 17 to 24",
    ),
    "aesthetic": RewardEntry(
        "stage_grpo.rewards.clip_rewards:AestheticReward",
        "looks, without the prompt (LAION's predictor v2)",
        "usually 1 to 10",
    ),
    "image_reward": RewardEntry(
        "stage_grpo.rewards.image_reward:ImageReward",
        "human preference (ImageReward), normalised",
        "usually -2 to 2",
        "Apache-2.0",
    ),
    "git": RewardEntry(
        "stage_grpo.rewards.git:GitReward",
        'attributes, GIT\'s answer to "red car?"',
        "[0, 1]",
        "Apache-2.0",
    ),
    "blip_vqa": RewardEntry(
        "stage_grpo.rewards.blip_vqa:BlipVqaReward",
        "attributes, BLIP's answer to each noun phrase (T2I-CompBench)",
        "[0, 1]",
        "MIT",
    ),
    "gdino": RewardEntry(
        "stage_grpo.rewards.gdino:GdinoReward",
        "objects, places and numbers, by GroundingDINO",
        "[0, 1]",
        "Apache-2.0",
    ),
    "orm": RewardEntry(
        "stage_grpo.rewards.orm:OrmReward",
        "does the image show the prompt: the yes of T2I-R1's judge",
        "[0, 1]",
        "Apache-2.0",
    ),
    "ocr": RewardEntry(
        "stage_grpo.rewards.ocr:OcrReward",
        "quoted text of the prompt, read by OCR",
        "[0, 1]",
        "MIT",
    ),
    "deqa": RewardEntry(
        "stage_grpo.rewards.remote:DeqaReward",
        "image quality (DeQA-Score), from a server with its old stack",
        "[1, 5]",
        "MIT",
    ),
    "unified_reward": RewardEntry(
        "stage_grpo.rewards.judges:UnifiedReward",
        "fit of image and prompt, UnifiedReward's final score",
        "[0, 1]",
        "MIT",
    ),
    "vlm_judge": RewardEntry(
        "stage_grpo.rewards.judges:VlmJudge",
        "realism or a question of your own, judged by Qwen2.5-VL",
        "[0, 1]",
    ),
    "maniqa": RewardEntry(
        "stage_grpo.rewards.maniqa:ManiqaReward",
        "image quality without the prompt (MANIQA, by pyiqa)",
        "[0, 1]",
        "PolyForm-Noncommercial-1.0.0",
    ),
}


def build_reward(name: str, options: dict[str, Any] | None = None) -> Reward:
    """Builds a reward by its name.

    Args:
        name: a name of ``REWARDS``, or ``module.path:attribute`` of your own function
            ``f(images, prompts, metadata)`` or :class:`Reward` class.
        options: fields of the class's ``Options``; for a function, its further keyword parameters. With ``url``, the
            reward is computed by the server there, see :class:`~stage_grpo.rewards.remote.RemoteReward`, and the
            options are those of the connection; its name may then be any. With ``worker: true`` it is computed in a
            process of its own, see :class:`~stage_grpo.rewards.worker.WorkerReward`.

    Raises:
        ValueError: an unknown name, a target that cannot be imported, a package that is missing, or an unknown or
            invalid option.
    """
    options = dict(options or {})
    if "url" in options:
        return _remote(name, options)
    if "worker" in options:
        return _in_worker(name, options)
    if name not in REWARDS and ":" not in name:
        raise ValueError(
            f"unknown reward {name!r}; known are {', '.join(sorted(REWARDS))}, "
            "or give module.path:function of your own"
        )
    with whole_models():  # a module of your own may load one as it is imported, or a class as it is built
        return _local(name, options)


def _local(name: str, options: dict[str, Any]) -> Reward:
    place = REWARDS[name].target if name in REWARDS else name
    target = load_target(place, f"reward {place!r}")
    if isinstance(target, type) and issubclass(target, Reward):
        check_option_names(f"reward {name!r}", options, [option.name for option in fields(target.Options)])
        checked = _checked_options(name, target.Options, options)
        _check_packages(name, target, checked)
        return target(checked)
    if callable(target) and not isinstance(target, type):
        check_option_names(f"reward {name!r}", options, _keyword_parameters(target, options))
        return FunctionReward(target, options)
    raise ValueError(f"{name!r} is {target!r}; name a function f(images, prompts, metadata) or a Reward class")


def build_ready_reward(name: str, options: dict[str, Any] | None = None) -> Reward:
    """Builds a reward as :func:`build_reward`, and makes sure that nothing it needs is missing.

    Raises:
        ValueError: it cannot be built, or lacks weights, a package or its server.
    """
    reward = build_reward(name, options)
    reward.check_health()
    for needed in reward.needed_weights():
        folder(needed)
    return reward


def _remote(name: str, options: dict[str, Any]) -> Reward:
    from stage_grpo.rewards.remote import RemoteOptions, RemoteReward

    check_option_names(f"reward {name!r}", options, [option.name for option in fields(RemoteOptions)])
    return RemoteReward(name, _checked_options(name, RemoteOptions, options))


def _in_worker(name: str, options: dict[str, Any]) -> Reward:
    from stage_grpo.rewards.worker import WorkerReward

    wanted = options.pop("worker")
    if not isinstance(wanted, bool):
        raise ValueError(f"reward {name!r} rejects its options: worker={wanted!r} is no truth value")
    outline = build_reward(name, options)
    return WorkerReward(name, options, outline) if wanted else outline


def reward_class(name: str) -> type[Reward]:
    """Class of a reward of the table. Its module is imported, its models are not."""
    place = REWARDS[name].target
    return load_target(place, f"reward {place!r}")


def _check_packages(name: str, reward: type[Reward], options: Any) -> None:
    needed = reward.needed_packages(options)
    if lacking := [package for package in needed if importlib.util.find_spec(package) is None]:
        raise ValueError(
            f"reward {name!r} needs {', '.join(lacking)}, which is not installed; "
            f"pip install 'stage-grpo[{reward.extra}]'"
        )


def lacking(name: str, options: dict[str, Any] | None = None) -> list[tuple[str, str]]:
    """What a reward needs and this machine lacks: each thing, and how to get it.

    Args:
        name: as in :func:`build_reward`.
        options: as in :func:`build_reward`.
    """
    try:
        reward = build_reward(name, options)
        absent = [weights for weights in reward.needed_weights() if not is_present(weights)]
    except ValueError as error:
        return [_thing_and_remedy(error)]
    found = [
        (f"the weights {weights} of reward {name} are not in {cache_folder()}", f"stage weights get {weights}")
        for weights in absent
    ]
    try:
        reward.check_health()
    except ValueError as error:
        found.insert(0, _thing_and_remedy(error))
    return found


def _thing_and_remedy(error: ValueError) -> tuple[str, str]:
    what, _, remedy = str(error).rpartition("; ")
    return what, remedy


def _checked_options(name: str, options_class: type[Any], options: dict[str, Any]) -> Any:
    required = [o.name for o in fields(options_class) if o.default is MISSING and o.default_factory is MISSING]
    if absent := [option for option in required if option not in options]:
        shown = ", ".join(absent)
        raise ValueError(f"reward {name!r} rejects its options: {shown} is missing; give the option {shown}")
    try:
        return options_class(**options)
    except (TypeError, ValueError) as error:
        # Not their values, among which may be a token.
        raise ValueError(f"reward {name!r} rejects its options {', '.join(options)}: {error}") from error


def _keyword_parameters(function: Callable[..., Any], options: dict[str, Any]) -> list[str]:
    """Names a function takes beyond images, prompts and metadata: any that are given, where it takes ``**kwargs``."""
    parameters = list(inspect.signature(function).parameters.values())
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return list(options)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in parameters[3:] if parameter.kind in named]
