"""The subcommand ``stage convert``."""

from __future__ import annotations

from stage_grpo.command_line import ArgumentParser


def main_convert(program: str, words: list[str]) -> str:
    """Run ``stage convert SRC DST --to transformers|original``.

    Args:
        program: Name shown in the help, e.g. ``"stage convert"``.
        words: Remaining words of the command line.

    Returns:
        The line to print.

    Raises:
        ValueError: If the words or the checkpoint are wrong, see `stage_grpo.checkpoints.convert`.
        OSError: If the destination cannot be written.
    """
    parser = ArgumentParser(prog=program, description="Convert a Janus or Janus-Pro checkpoint between two formats.")
    parser.add_argument("src", help="checkpoint folder")
    parser.add_argument("dst", help="folder to write")
    parser.add_argument("--to", choices=("transformers", "original"), default="transformers", help="(transformers)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion at DST")
    options = parser.parse_args(words)

    from stage_grpo.checkpoints.convert import convert

    return f"wrote {convert(options.src, options.dst, options.to, overwrite=options.overwrite)}"
