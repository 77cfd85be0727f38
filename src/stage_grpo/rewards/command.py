"""The commands ``stage rewards`` and ``stage serve-reward``."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from stage_grpo.command_line import ArgumentParser
from stage_grpo.rewards.connection import is_loopback
from stage_grpo.rewards.registry import REWARDS, build_ready_reward, lacking, reward_class
from stage_grpo.weights import WEIGHTS
from stage_grpo.weights.command import as_table


def main_rewards(program: str, words: Sequence[str]) -> str:
    """List the rewards: name, what it measures, range, licences, and what is missing to use it.

    Raises:
        ValueError: A word that is not known.
    """
    parser = ArgumentParser(
        prog=program,
        description="List the rewards: what each measures, its range, the licences of the original's code and of the "
        "weights, and what is missing to use it.",
    )
    parser.parse_args(list(words))
    rows = [("name", "measures", "range", "code", "weights", "state")]
    for name, entry in REWARDS.items():
        licences = dict.fromkeys(WEIGHTS[weights].licence for weights in reward_class(name).requirements)
        rows.append((name, entry.description, entry.range, entry.licence, ", ".join(licences) or "-", _state(name)))
    return "\n".join(as_table(rows))


def _state(name: str) -> str:
    if name == "deqa":
        return "needs a url: docs/rewards.md"
    return "; ".join(remedy for _, remedy in lacking(name)) or "ready"


def main_serve(program: str, words: Sequence[str], announce: Callable[[str], None]) -> None:
    """Serve a reward over HTTP until interrupted: ``NAME [--port N] [--host H] [--token T]``.

    Args:
        program: Name shown in the help.
        words: Remaining words of the command line.
        announce: Takes the line that says where it listens.

    Raises:
        ValueError: A wrong word or value, an unknown reward, or something that is missing to compute it.
    """
    parser = ArgumentParser(prog=program, description="Serve a reward over HTTP; docs/rewards.md states the protocol.")
    parser.add_argument("name", metavar="NAME", help="see stage rewards, or module:function of your own")
    parser.add_argument("--options", default="{}", metavar="JSON", help="options of the reward")
    parser.add_argument("--port", type=int, default=8000, help="port (8000)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    secret = parser.add_mutually_exclusive_group()
    secret.add_argument("--token", help="clients must bring it (none)")
    secret.add_argument("--token-file", metavar="FILE", help="file that holds the token, unseen by other users")
    parser.add_argument("--max-images", type=int, default=256, help="images of one request (256)")
    parser.add_argument("--max-mb", type=int, default=256, help="megabytes of one request (256)")
    given = parser.parse_args(list(words))

    _check_ready(given)
    token = _token(given)
    options = json.loads(given.options)
    from stage_grpo.rewards.protocol import Limits
    from stage_grpo.rewards.server import make_app, serve

    reward = build_ready_reward(given.name, options)
    app = make_app(reward, token, Limits(max_images=given.max_images, max_bytes=given.max_mb * 1_000_000))
    warning = "" if token or is_loopback(given.host) else "; anyone who reaches it can use it: give --token-file"
    announce(f"serving {reward.name} on http://{given.host}:{given.port}{warning}")
    serve(app, given.host, given.port)


def _check_ready(given: argparse.Namespace) -> None:
    if any(importlib.util.find_spec(package) is None for package in ("starlette", "uvicorn")):
        raise ValueError("serving needs starlette and uvicorn; pip install 'stage-grpo[server]'")
    for name, least, most in (("port", 1, 65535), ("max_images", 1, 100_000), ("max_mb", 1, 100_000)):
        value = getattr(given, name)
        if not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be between {least} and {most}")
    try:
        fine = isinstance(json.loads(given.options), dict)
    except json.JSONDecodeError:
        fine = False
    if not fine:
        raise ValueError(f"--options {given.options!r} is no JSON object; write {{OPTION: VALUE}}")


def _token(given: argparse.Namespace) -> str | None:
    if given.token_file is None:
        token = given.token
    else:
        try:
            token = Path(given.token_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--token-file {given.token_file} cannot be read ({error}); name a text file") from error
    if token == "":
        raise ValueError("the token is empty; give one of at least a character, or none")
    return token
