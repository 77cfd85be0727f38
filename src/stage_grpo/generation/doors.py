"""The scripts of ``infer/``: flags that users of the published STAGE code know, as words of ``stage generate``.

Flags that are not listed here go to ``stage generate`` as they are.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import dataclass
from typing import NoReturn

from stage_grpo.command_line import ArgumentParser

TEMPLATE = "t2i_r1"
"""The published code writes prompts like this for every model."""


@dataclass(frozen=True)
class Door:
    """One script.

    Attributes:
        benchmark: Benchmark that it is for, or None.
        prompts_flag: Flag that names its prompts.
        required: Whether that flag has to be given, as there are no official prompts.
        num_images: Images of each prompt where no benchmark says so.
    """

    benchmark: str | None
    prompts_flag: str
    required: bool = False
    num_images: int | None = None


DOORS = {
    "geneval": Door("geneval", "--prompts_dir"),
    "hps": Door("hps", "--prompts_dir"),
    "drawbench": Door("drawbench", "--drawbench_csv_path"),
    "t2i_compbench": Door("t2i_compbench", "--prompts_dir"),
    "ocr": Door("ocr", "--ocr_txt_path"),
    "prompts": Door(None, "--data_path", required=True, num_images=4),
}


class _DoorParser(ArgumentParser):
    """Errors end the process, in one line: a script has nobody above it to catch them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def generate_words(name: str, words: list[str]) -> list[str]:
    """Translate a script's arguments.

    Args:
        name: A name in ``DOORS``.
        words: Arguments of the script.

    Returns:
        Arguments of ``stage generate``.

    Raises:
        SystemExit: Help was asked for, or a flag is wrong or cannot be honoured; the latter with code 2.
    """
    from stage_grpo.generation.pipeline import find_checkpoint, trained_template

    door = DOORS[name]
    parser = _parser(door)
    options, rest = parser.parse_known_args(words)
    if options.semantic_cot:
        parser.error(
            "semantic_cot=True: a plan in words before the image is not supported, so the images of T2I-R1's own "
            "inference, which always writes one, cannot be made; leave the flag out, as STAGE's scripts do by default"
        )
    try:
        model = find_checkpoint(options.model_path)
    except ValueError as error:
        parser.error(str(error))
    given = {
        "--benchmark": door.benchmark,
        "--prompts": options.prompts,
        "--num-images": options.num_generation,
        "--image-size": options.image_size,
        "--temperature": options.temperature,
        "--prompt-template": trained_template(model) or TEMPLATE,
    }
    translated = ["--model", model, "--out", options.save_root]
    translated += [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
    if getattr(options, "bench_types", None):
        translated += ["--categories", *(category.removesuffix("_val") for category in options.bench_types)]
    return [*translated, *rest]


def _parser(door: Door) -> _DoorParser:
    what = f"the benchmark {door.benchmark}" if door.benchmark else "the prompts of a file"
    parser = _DoorParser(
        description=f"Write images for {what}, alone or under torchrun. Further flags are those of stage generate.",
    )
    home = (
        "prompt file: .txt, .jsonl or .csv" if door.required else "prompts (the official ones, see stage data fetch)"
    )
    parser.add_argument("--model_path", required=True, help="checkpoint, adapter or run folder, or hub name")
    parser.add_argument(door.prompts_flag, dest="prompts", required=door.required, help=home)
    roots = ("--save_root",) if door.benchmark else ("--save_root", "--save_dir")
    fallback = None if door.benchmark else "outputs/images"
    parser.add_argument(*roots, dest="save_root", required=not fallback, default=fallback, help="folder to write")
    number = f"images of each prompt ({door.num_images or 'as the benchmark has it'})"
    parser.add_argument("--num_generation", type=int, default=door.num_images, help=number)
    parser.add_argument("--temperature", type=float, help="temperature (1)")
    parser.add_argument("--image-size", type=int, help="height of the model's images, in pixels")
    if door.benchmark == "t2i_compbench":
        parser.add_argument("--bench_types", nargs="+", help="categories, e.g. color_val shape_val (all)")
    parser.add_argument("--semantic_cot", type=_truth, default=False, help="False; True is not supported")
    parser.add_argument("--reasoning_prompt_path", help="taken and not read: only semantic_cot would read it")
    return parser


def _truth(word: str) -> bool:
    """Unlike ``bool``, which takes "False" for true."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if word.lower() not in words:
        raise ArgumentTypeError(f"{word!r} is neither True nor False")
    return words[word.lower()]
