"""What a run can be told about its token weights: ``token_weighting*``, and the keys that are STAGE's options."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from stage_grpo.presets import PRESETS
from stage_grpo.weighting.base import TokenWeighting
from stage_grpo.weighting.registry import build_weighting


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class StageKeys:
    """The options of ``stage``, keys of their own so that a preset can fill them in."""

    reweight_advantages: bool | None = _option(None, "Multiply advantages by M (Eq. 7, 8).")
    advantage_weight_normalization: str | None = _option(None, "none (the paper) or group (the released code).")
    reweight_kl: bool | None = _option(None, "Multiply the KL of each token by its similarity weight.")
    kl_weight_form: str | None = _option(None, "clipped (the paper) or graded.")
    kl_weight_a: float | None = _option(None, "a of the KL weight.")
    kl_weight_b: float | None = _option(None, "b of the KL weight.")
    kl_weight_clip: list[float] | None = field(
        default=None, metadata={"help": "Bounds of Sim + 1 in the clipped KL weight."}
    )


@dataclass
class WeightingOptions(StageKeys):
    """The token weights' part of :class:`~stage_grpo.config.StageConfig`. See docs/adding_a_weighting.md."""

    token_weighting: str = _option("stage", "stage, critical, none, or module:name of your own.")
    token_weighting_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of a weighting other than stage, e.g. {dynamic: false}."}
    )


def chosen_weighting(config: Any) -> TokenWeighting:
    """Builds the weighting that a configuration asks for.

    Args:
        config: A :class:`~stage_grpo.config.StageConfig`.

    Raises:
        ValueError: As :func:`~stage_grpo.weighting.registry.build_weighting`.
    """
    if config.token_weighting == "stage":
        return build_weighting("stage", {key.name: getattr(config, key.name) for key in fields(StageKeys)})
    return build_weighting(config.token_weighting, config.token_weighting_options)


def check_values(config: Any) -> None:
    """Refuses a weighting that cannot be built, and settings that would do nothing.

    Raises:
        ValueError: As :func:`~stage_grpo.weighting.registry.build_weighting`; if options are no mapping or belong to
            another weighting, or if the weighting needs a reference policy and ``beta=0`` loads none.
    """
    name, options = config.token_weighting, config.token_weighting_options
    if not isinstance(name, str):
        raise ValueError(f"token_weighting={name!r} is no name; use none to weigh all tokens alike")
    if not isinstance(options, dict | None):
        raise ValueError(f"token_weighting_options={options!r} must map options to their values: {{dynamic: false}}")
    keys = [key.name for key in fields(StageKeys)]
    if name == "stage" and options:
        raise ValueError(
            f"token_weighting_options={options} are not read by stage, whose options are keys of their own; set "
            f"{', '.join(keys)}"
        )
    # A resolved configuration may be read again: what agrees with its preset was not asked for.
    asked = [key for key in keys if getattr(config, key) != PRESETS[config.preset][key]]
    if name != "stage" and asked:
        raise ValueError(
            f"{asked[0]}={getattr(config, asked[0])!r} is an option of token_weighting=stage and does nothing with "
            f"{name}; leave it out"
        )
    if chosen_weighting(config).needs_reference and config.beta == 0:
        raise ValueError(
            f"token_weighting={name!r} needs the reference policy's log-probabilities, but beta=0 loads no reference; "
            "set beta above 0" + (", or token_weighting_options: {dynamic: false}" if name == "critical" else "")
        )
