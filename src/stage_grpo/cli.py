"""The command ``stage``: one subcommand a task. Wrong input ends in one line and exit code 2."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from stage_grpo.command_line import ArgumentParser

COMMANDS: dict[str, tuple[str, Callable[[str, list[str]], None]]] = {}


def command(name: str, summary: str) -> Callable[[Any], Any]:
    """Register a subcommand: a function of the program's name and the remaining arguments."""

    def register(function: Callable[[str, list[str]], None]) -> Callable[[str, list[str]], None]:
        COMMANDS[name] = (summary, function)
        return function

    return register


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words after ``stage``; by default those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = next((known for known in sorted(COMMANDS, key=len, reverse=True) if _begins(words, known)), None)
    if name is None:
        groups = {known.split()[0] for known in COMMANDS if " " in known}
        (_print_group if words and words[0] in groups else _print_help)(words)
        return
    # Renamings announced by the libraries for their next major version are for us, not for users.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        COMMANDS[name][1](f"stage {name}", words[len(name.split()) :])
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split("\n"))
        print(f"stage {name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"stage {name}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _begins(words: list[str], name: str) -> bool:
    return words[: len(name.split())] == name.split()


def _print_help(words: list[str]) -> None:
    lines = [f"  {name:<18} {summary}" for name, (summary, _) in COMMANDS.items()]
    print("usage: stage COMMAND ...\n\n" + "\n".join(lines) + "\n\n'stage COMMAND --help' explains one.")
    if words and words[0] not in ("-h", "--help"):
        print(f"stage: error: unknown command {words[0]!r}", file=sys.stderr)
        sys.exit(2)


def _print_group(words: list[str]) -> None:
    """List the commands that begin with a word, such as ``data``."""
    lines = [f"  {name:<18} {summary}" for name, (summary, _) in COMMANDS.items() if name.split()[0] == words[0]]
    print(f"usage: stage {words[0]} COMMAND ...\n\n" + "\n".join(lines))
    if words[1:2] not in (["-h"], ["--help"]):
        given = repr(" ".join(words[:2]))
        print(f"stage: error: {given} is no command; 'stage {words[0]} --help' lists them", file=sys.stderr)
        sys.exit(2)


@command("train", "train a policy from a YAML file; every key is also a flag")
def _train(program: str, words: list[str]) -> None:
    from stage_grpo.config import parse_config
    from stage_grpo.training import train

    _hide_loading_bars()
    result = train(parse_config(program, words))
    if not result.is_main_process:
        return
    checkpoint = f"{result.folder}/checkpoint-{result.step}"
    if result.stopped_by is None:
        print(f"saved {result.folder}")
    elif result.only_anew is not None:
        print(f"{result.stopped_by}: saved {checkpoint}; save_only_model leaves nothing to continue with:")
        print(f"  {result.only_anew}")
    else:
        # The last of several equal flags counts. A launcher's own words are not known here.
        again = shlex.join([*program.split(), *words, "--resume", "auto"])
        how = "the command that launched it" if "WORLD_SIZE" in os.environ else again
        print(f"{result.stopped_by}: saved {checkpoint}; continue with\n  {how}")


@command("generate", "write images for prompts")
def _generate(program: str, words: list[str]) -> None:
    from stage_grpo.generation.command import main_generate

    _hide_loading_bars()
    print(main_generate(program, words))


@command("evaluate", "score a folder of images on a benchmark")
def _evaluate(program: str, words: list[str]) -> None:
    from stage_grpo.evaluation.command import main_evaluate

    _hide_loading_bars()
    print(main_evaluate(program, words))


@command("compare", "paired differences between scores, beside published results")
def _compare(program: str, words: list[str]) -> None:
    from stage_grpo.comparison.command import main_compare

    print(main_compare(program, words))


@command("score", "score a folder of images with rewards")
def _score(program: str, words: list[str]) -> None:
    from stage_grpo.scoring import main_score

    _hide_loading_bars()
    print(main_score(program, words))


@command("rewards", "list the rewards and what each needs")
def _rewards(program: str, words: list[str]) -> None:
    from stage_grpo.rewards.command import main_rewards

    print(main_rewards(program, words))


@command("serve-reward", "serve a reward over HTTP")
def _serve_reward(program: str, words: list[str]) -> None:
    from stage_grpo.rewards.command import main_serve

    main_serve(program, words, lambda line: print(line, flush=True))


@command("weights list", "list the weights of reward models and where they are")
def _weights_list(program: str, words: list[str]) -> None:
    from stage_grpo.weights.command import main_list

    print(main_list(program, words))


@command("weights get", "get weights of reward models, checked and converted")
def _weights_get(program: str, words: list[str]) -> None:
    from stage_grpo.weights.command import main_get

    _hide_loading_bars()
    print(main_get(program, words))


@command("report", "write the HTML report of a run, or a gallery of image sets")
def _report(program: str, words: list[str]) -> None:
    from stage_grpo.pages.command import main_report

    print(main_report(program, words))


@command("demo", "train the tiny Janus and show before and after")
def _demo(program: str, words: list[str]) -> None:
    from stage_grpo.demo import DemoConfig, run_demo

    _hide_loading_bars()
    print(run_demo(_parse(DemoConfig, program, words)))


@command("ablate", "run grids of variants, settings and seeds, and say what they show")
def _ablate(program: str, words: list[str]) -> None:
    from stage_grpo.ablation.command import main_ablate

    text, code = main_ablate(program, words)
    print(text)
    if code:
        sys.exit(code)


@command("plan", "memory, images, operations and disk of a run, before it starts")
def _plan(program: str, words: list[str]) -> None:
    from stage_grpo.planning.command import main_plan

    print(main_plan(program, words))


@command("launch", "check what a run needs, say what is missing, and start it, one process a GPU")
def _launch(program: str, words: list[str]) -> None:
    from stage_grpo.launch import prepare_launch

    launch = prepare_launch(program, words)
    print(launch.describe())
    if launch.is_dry:
        return
    if launch.lacking:
        sys.exit(2)
    launch.start()


@command("convert", "convert a checkpoint between DeepSeek's and transformers' format")
def _convert(program: str, words: list[str]) -> None:
    from stage_grpo.checkpoints.command import main_convert

    print(main_convert(program, words))


@command("merge", "merge a LoRA adapter into its base and write a checkpoint")
def _merge(program: str, words: list[str]) -> None:
    from stage_grpo.merge import main_merge

    _hide_loading_bars()
    print(main_merge(program, words))


@command("shapes pretrain", "make the tiny Janus of the shapes world from nothing")
def _shapes_pretrain(program: str, words: list[str]) -> None:
    from stage_grpo.shapes.pretrain import PretrainConfig, pretrain

    print(f"wrote {pretrain(_parse(PretrainConfig, program, words))}")


@command("shapes prompts", "write prompts of the shapes world")
def _shapes_prompts(program: str, words: list[str]) -> None:
    parser = ArgumentParser(prog=program, description="Write prompts of the shapes world as JSON lines.")
    parser.add_argument("--split", choices=("train", "heldout"), required=True, help="which prompts")
    parser.add_argument("--ratio", default="1:1:1:1:1:1", help="single:two:counting:colors:position:attributes")
    parser.add_argument("--num", type=int, default=600, help="prompts in all (600)")
    parser.add_argument("--out", required=True, help="file to write")
    options = parser.parse_args(words)

    from stage_grpo.shapes.prompts import mixed_rows, write_prompts

    if not all(share.isdigit() for share in options.ratio.split(":")):
        raise ValueError(f"--ratio {options.ratio} must be six numbers joined by colons, e.g. 0:3:2:1:4:4")
    rows = mixed_rows(options.split, [int(share) for share in options.ratio.split(":")], options.num)
    write_prompts(options.out, rows)
    print(f"wrote {len(rows)} prompts to {options.out}")


@command("data list", "list the prompt sets and where they are")
def _data_list(program: str, words: list[str]) -> None:
    from stage_grpo.prompt_sets.command import main_list

    print(main_list(program, words))


@command("data fetch", "download a prompt set from its official home")
def _data_fetch(program: str, words: list[str]) -> None:
    from stage_grpo.prompt_sets.command import main_fetch

    print(main_fetch(program, words))


@command("data build-geneval", "write GenEval-style training prompts")
def _data_build_geneval(program: str, words: list[str]) -> None:
    from stage_grpo.prompt_sets.command import main_build_geneval

    print(main_build_geneval(program, words))


def _hide_loading_bars() -> None:
    """Leave the terminal to our own progress bars; loading a checkpoint shows one for every file."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _parse(config_class: Any, program: str, words: list[str]) -> Any:
    """Build a dataclass from flags named like its fields."""
    from stage_grpo.config import OneLineParser

    (config,) = OneLineParser(config_class, prog=program).parse_args_into_dataclasses(words)
    return config


if __name__ == "__main__":
    main()
