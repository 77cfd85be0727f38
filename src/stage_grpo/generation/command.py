"""``stage generate``: images for prompts or for a benchmark, on one device or shared out by ``torchrun``."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from stage_grpo.benchmark_rows import benchmark_rows
from stage_grpo.benchmarks import BENCHMARKS, get_benchmark
from stage_grpo.command_line import ArgumentParser
from stage_grpo.data import load_rows
from stage_grpo.images.layouts import LAYOUTS
from stage_grpo.types import PromptRow

if TYPE_CHECKING:
    from stage_grpo.generation.pipeline import ImagePipeline
    from stage_grpo.sampling import Sampling

DTYPES = ("float32", "bfloat16", "float16", "auto")


def main_generate(program: str, words: list[str]) -> str:
    """Run ``stage generate``.

    Under ``torchrun`` each process takes its share of the work and the GPU of its local rank.

    Args:
        program: Name of the command in its help.
        words: Its arguments.

    Returns:
        What to print.

    Raises:
        ValueError: Wrong arguments, prompts, model or folder; the message names the value and the remedy.
    """
    options = _parser(program).parse_args(words)
    rows = _rows(options)
    layout, num_images = _arrangement(options)
    _sampling(options, 5.0)  # wrong values end before loading
    process, num_processes = _share()
    out = Path(options.out).expanduser()

    from stage_grpo.generation.generate import check_folder, generate
    from stage_grpo.generation.pipeline import ImagePipeline, find_checkpoint

    check_folder(out, layout, options.overwrite, num_processes)
    model = find_checkpoint(options.model)
    pipeline = ImagePipeline.from_pretrained(model, options.dtype, _device(), options.prompt_template)
    _check_image_size(pipeline, options.image_size)
    done = generate(
        pipeline.policy,
        pipeline.tokenizer,
        rows,
        out,
        _sampling(options, pipeline.default_guidance_scale),
        num_images=num_images,
        seed=options.seed,
        batch_size=options.batch_size,
        prompt_template=pipeline.prompt_template,
        layout=layout,
        model=model,
        share=(process, num_processes),
        overwrite=options.overwrite,
    )
    who = "" if num_processes == 1 else f"process {process} of {num_processes}: "
    kept = f", {done.num_kept} were there" if done.num_kept else ""
    state = "" if done.complete else "; the set is not complete yet"
    return f"{who}wrote {done.num_written} images to {done.folder}{kept}{state}"


def _parser(program: str) -> ArgumentParser:
    parser = ArgumentParser(prog=program, description="Write images for prompts. An interrupted run is continued.")
    parser.add_argument("--model", required=True, help="checkpoint, adapter or run folder, or hub name")
    parser.add_argument("--prompt", help="one prompt")
    parser.add_argument("--prompts", help="prompt file: .txt, .jsonl or .csv; with --benchmark, its file or folder")
    parser.add_argument("--benchmark", choices=sorted(BENCHMARKS), help="take a benchmark's prompts and protocol")
    parser.add_argument("--categories", nargs="+", help="with --benchmark: only these of its categories")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="begin anew; the set in --out is deleted")
    parser.add_argument(
        "--layout", choices=sorted(LAYOUTS), help="arrangement of files (the benchmark's, else geneval)"
    )
    parser.add_argument("--num-images", type=int, help="images of each prompt (the benchmark's number, else 1)")
    parser.add_argument("--batch-size", type=int, help="images at a time (what fits, at most 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed (0)")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance (the checkpoint's own, else 5)")
    parser.add_argument("--temperature", type=float, default=1.0, help="temperature (1)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest codes (all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest codes of this share (all)")
    parser.add_argument("--min-p", type=float, default=0.0, help="drop codes below this share of the likeliest (none)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--prompt-template", help="janus or t2i_r1 (what the run was trained with, else janus)")
    parser.add_argument("--image-size", type=int, help="refuse a model whose images have another height, in pixels")
    return parser


def _rows(options: Namespace) -> list[PromptRow]:
    if options.prompt is not None and (options.prompts or options.benchmark):
        raise ValueError("--prompt goes with neither --prompts nor --benchmark; leave one out")
    if options.categories and not options.benchmark:
        raise ValueError(f"--categories {' '.join(options.categories)} needs --benchmark, whose categories they are")
    if options.benchmark:
        return benchmark_rows(get_benchmark(options.benchmark), options.prompts, options.categories)
    if options.prompts:
        return load_rows(options.prompts)
    if options.prompt is None:
        raise ValueError("one of the arguments --prompt --prompts --benchmark is required")
    return [PromptRow(options.prompt, {})]


def _arrangement(options: Namespace) -> tuple[str, int]:
    """Layout and images per prompt."""
    protocol = get_benchmark(options.benchmark) if options.benchmark else None
    layout = options.layout or (protocol.layout if protocol else "geneval")
    if options.num_images is not None:
        return layout, options.num_images
    return layout, protocol.images_per_prompt if protocol else 1


def _sampling(options: Namespace, default_guidance_scale: float) -> Sampling:
    from stage_grpo.sampling import Sampling

    scale = default_guidance_scale if options.guidance_scale is None else options.guidance_scale
    return Sampling(scale, options.temperature, options.top_k, options.top_p, options.min_p)


def _share() -> tuple[int, int]:
    """Rank and number of the processes that torchrun started; without it 0 of 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK={rank}, but this machine shows {torch.cuda.device_count()} GPUs; start as many processes"
        )
    torch.cuda.set_device(rank)
    return f"cuda:{rank}"


def _check_image_size(pipeline: ImagePipeline, image_size: int | None) -> None:
    size = pipeline.policy.image_size
    if image_size not in (None, size):
        raise ValueError(
            f"image_size={image_size}: this model draws {size} px; use another checkpoint, or --image-size {size}"
        )
