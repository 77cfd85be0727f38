"""The subcommand ``stage plan``."""

from __future__ import annotations

from collections.abc import Sequence

from stage_grpo.command_line import ArgumentParser


def main_plan(program: str, words: Sequence[str]) -> str:
    """Run ``stage plan CONFIG [--gpus N] [--gpu-memory GB] [--parallel NAME] [--KEY VALUE ...]``.

    Args:
        program: Name shown in the help, e.g. ``"stage plan"``.
        words: Remaining words of the command line; those not known here are keys of the configuration.

    Returns:
        The text to print. A plan that does not fit is no error: it says so, and what would help.

    Raises:
        ValueError: If a word or a value is wrong, or the sizes of the model are not known.
    """
    parser = ArgumentParser(
        prog=program,
        usage="%(prog)s CONFIG.yaml [options] [--KEY VALUE ...]",
        description="Memory by component, images, operations and disk of a run, before it starts.",
        epilog="Any other --KEY VALUE overrides the configuration, as in stage train.",
    )
    parser.add_argument("--gpus", type=int, help="processes, one GPU each (8; 1 with use_peft)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="memory of a GPU in GB (%(default)g)")
    parser.add_argument("--parallel", help="zero3, zero2, ddp, fsdp2 or zero3_offload (zero3; ddp with use_peft)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of the longest prompt (%(default)d)")
    options, rest = parser.parse_known_args(list(words))

    from stage_grpo.config import parse_config
    from stage_grpo.planning.plan import default_gpus, describe, make_plan

    config = parse_config(program, rest, lambda config: options.gpus or default_gpus(config))
    return describe(make_plan(config, options.gpus, options.gpu_memory, options.parallel, options.prompt_tokens))
