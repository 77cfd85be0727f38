"""The images that a set should hold: by its prompts, by its manifest, or by what its folders say of themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from stage_grpo.benchmarks import Benchmark
from stage_grpo.images.folders import IMAGE_SUFFIXES
from stage_grpo.images.layouts import LAYOUTS, ImageLayout, PlannedImage, plan_images
from stage_grpo.images.problems import Problems
from stage_grpo.images.set_files import MANIFEST, SetFiles, read_description
from stage_grpo.types import Metadata, PromptRow

_MOST_SAMPLES = 64
_DESCRIBED = ("prompt", "tag", "include", "exclude")


@dataclass(frozen=True)
class ExpectedImage:
    """One image that should be there.

    Attributes:
        path: Where, from the folder of the set.
        index: Place of its prompt.
        sample: Which image of the prompt, from 0.
        prompt: What it should have been made from.
        metadata: What the prompt asks for; holds "prompt" and "tag".
        sha256: Of the file, where a manifest says so.
        is_usable: Whether the records agree on what it was made from; if not, it is not scored, and that is noted.
    """

    path: PurePosixPath
    index: int
    sample: int
    prompt: str
    metadata: Metadata
    sha256: str | None = None
    is_usable: bool = True


def expected_images(
    benchmark: Benchmark,
    files: SetFiles,
    rows: Sequence[PromptRow] | None,
    num_images: int | None,
    problems: Problems,
) -> tuple[list[ExpectedImage], str]:
    """The images that the set should hold, in the order of the prompts.

    Args:
        benchmark: The benchmark.
        files: What is there.
        rows: The prompts, if they are known.
        num_images: Images of each; by default what ``generation.json`` says, or what most prompts have.
        problems: Takes note of records that contradict each other.

    Returns:
        The images, and where the prompts come from: "prompts", "manifest" or "folders".

    Raises:
        ValueError: Nothing says which images there should be.
    """
    if rows is not None:
        return _from_rows(benchmark, files, rows, num_images, problems), "prompts"
    if files.manifest is not None:
        images = _from_manifest(benchmark, files, files.manifest, problems)
        if num_images is not None:
            _check_counts(files, images, num_images, f"--num-images says {num_images}", problems)
        return images, "manifest"
    if LAYOUTS[benchmark.layout].describes_prompts:
        return _from_folders(benchmark, files, num_images, problems), "folders"
    fetch = f"get the official ones by: stage data fetch {benchmark.prompt_set}" if benchmark.prompt_set else ""
    raise ValueError(
        f"{files.root} does not say what its images were made from (no {files.side / MANIFEST}); give their prompts "
        f"by --prompts{', or ' if fetch else ''}{fetch}"
    )


def _from_rows(
    benchmark: Benchmark, files: SetFiles, rows: Sequence[PromptRow], num_images: int | None, problems: Problems
) -> list[ExpectedImage]:
    layout = LAYOUTS[benchmark.layout]
    said = files.generation.get("num_images")
    named = _names_by_number(layout, files)
    if num_images is None:
        num_images = said if isinstance(said, int) and said > 0 else _usual_number(layout, files, rows, named)
    images = [
        ExpectedImage(_path(image, named), image.index, image.sample, image.row.prompt, image.row.metadata)
        for image in plan_images(layout, rows, num_images)
    ]
    _check_number(len(rows), files, layout.describes_prompts, problems)
    foreign: set[int] = set()
    if layout.describes_prompts:
        foreign = _check_folders(files, rows, problems)
    images = _with_manifest(images, files, problems)
    return [replace(image, is_usable=image.is_usable and image.index not in foreign) for image in images]


def _names_by_number(layout: ImageLayout, files: SetFiles) -> dict[tuple[int, int], PurePosixPath]:
    """Where the images of a set of another program lie, by the numbers of prompt and image.

    GenEval's own scorer reads ``samples/0.png`` of the folder ``7`` as well as ``samples/00000.png`` of ``00007``.
    Empty for our own sets, whose names are known, and where a scorer reads no other names.
    """
    if not layout.describes_prompts or files.manifest is not None or files.generation:
        return {}
    found = [path for path in files.found if path.parts[0].isdecimal() and _is_sample(path, path.parts[0])]
    # Of two names of one number the longer stands, as the official script writes it; the other belongs to no prompt.
    found.sort(key=lambda path: (len(str(path.with_suffix(""))), path))
    return {(int(path.parts[0]), int(path.stem)): path.with_suffix(".png") for path in found}


def _path(image: PlannedImage, named: dict[tuple[int, int], PurePosixPath]) -> PurePosixPath:
    return named.get((image.index, image.sample), image.path)


def _usual_number(
    layout: ImageLayout,
    files: SetFiles,
    rows: Sequence[PromptRow],
    named: dict[tuple[int, int], PurePosixPath],
) -> int:
    """How many images most prompts have: samples are counted as long as at least half of the prompts have them."""
    stems = {path.with_suffix("") for path in files.found}
    most = max(1, min(_MOST_SAMPLES, len(files.found)))
    plan = plan_images(layout, rows, most)
    counts = Counter(image.sample for image in plan if _path(image, named).with_suffix("") in stems)
    number = 1
    while number < most and 2 * counts[number] >= counts[0] > 0:
        number += 1
    return number


def _check_number(num_rows: int, files: SetFiles, has_folders: bool, problems: Problems) -> None:
    """Whether the set has as many prompts as there should be."""
    if has_folders:
        num_found, what = len(files.prompt_folders), "prompt folders"
    elif files.manifest is not None:
        num_found, what = len({line["index"] for line in files.manifest.values()}), "prompts"
    else:
        return
    if num_found != num_rows:
        problems.add(
            "number of prompts",
            f"{files.root}: {num_found} {what} for {num_rows} prompts; generate all, or say by --categories or "
            "--prompts which ones were",
        )


def _check_folders(files: SetFiles, rows: Sequence[PromptRow], problems: Problems) -> set[int]:
    """Compare what prompt folders say with the prompts; returns the numbers of those made from another prompt."""
    foreign = set()
    for name in files.prompt_folders:
        index = int(name)
        if index >= len(rows):
            problems.add("extra prompt folder", f"{files.root / name}: there are {len(rows)} prompts; remove it")
            continue
        metadata = read_description(files.root / name, None, problems)
        if metadata is None:
            continue
        row = rows[index]
        wanted = {**row.metadata, "prompt": row.prompt}
        differing = [key for key in _DESCRIBED if metadata.get(key) != wanted.get(key)]
        if metadata["prompt"] != row.prompt:
            foreign.add(index)
            problems.add(
                "other prompt",
                f"{files.root / name}: made from {metadata['prompt']!r}, expected {row.prompt!r}; give --prompts FILE",
            )
        elif differing:
            problems.add(
                "metadata", f"{files.root / name}: metadata differ in {', '.join(differing)} from the prompts'"
            )
    return foreign


def _with_manifest(images: list[ExpectedImage], files: SetFiles, problems: Problems) -> list[ExpectedImage]:
    """Add checksums; leave out images that the manifest gives to another prompt."""
    if files.manifest is None:
        return images
    kept = []
    for image in images:
        line = files.manifest.get(image.path)
        if line is None:
            problems.add("manifest", f"{image.path}: not in {MANIFEST}; run the same `stage generate` again")
        elif line["prompt"] != image.prompt:
            problems.add(
                "other prompt",
                f"{image.path}: made from {line['prompt']!r}, expected {image.prompt!r}; give --prompts",
            )
            continue
        kept.append(image if line is None else replace(image, sha256=line["sha256"]))
    return kept


def _from_manifest(
    benchmark: Benchmark, files: SetFiles, manifest: dict[PurePosixPath, dict[str, Any]], problems: Problems
) -> list[ExpectedImage]:
    described: dict[str, Metadata | None] = {}
    if LAYOUTS[benchmark.layout].describes_prompts:
        for name in dict.fromkeys(path.parts[0] for path in manifest):
            described[name] = _description(benchmark, files, name, problems)
    images = []
    for path, line in manifest.items():
        metadata = described.get(path.parts[0]) if described else {"tag": line.get("tag"), "prompt": line["prompt"]}
        is_usable = metadata is not None  # else noted where it was read
        if metadata is not None and metadata["prompt"] != line["prompt"]:
            problems.add("other prompt", f"{path}: made from {line['prompt']!r}, described as {metadata['prompt']!r}")
            is_usable = False
        elif metadata is not None and metadata.get("tag") not in benchmark.columns:
            tags = ", ".join(benchmark.columns)
            problems.add("unknown tag", f"{path}: tag {metadata.get('tag')!r} in {MANIFEST} is none of {tags}")
            is_usable = False
        place = (path, line["index"], line["sample"])
        images.append(ExpectedImage(*place, line["prompt"], metadata or {}, line["sha256"], is_usable))
    return images


def _description(benchmark: Benchmark, files: SetFiles, name: str, problems: Problems) -> Metadata | None:
    folder = files.root / name
    if not folder.is_dir():
        problems.add("missing prompt folder", f"{folder}: missing; generate the prompts again")
        return None
    return read_description(folder, benchmark.columns, problems)


def _from_folders(
    benchmark: Benchmark, files: SetFiles, num_images: int | None, problems: Problems
) -> list[ExpectedImage]:
    names = files.prompt_folders
    if not names:
        raise ValueError(
            f"{files.root} holds no prompt folders; expected {files.root / '00000'} with metadata.jsonl and "
            "samples/00000.png, and so on."
        )
    for number in sorted(set(range(int(names[-1]) + 1)) - {int(name) for name in names}):
        problems.add("missing prompt folder", f"{files.root / f'{number:05d}'}: missing; generate the prompts again")
    images = []
    for name in names:
        metadata = read_description(files.root / name, benchmark.columns, problems)
        paths = sorted(path for path in files.found if _is_sample(path, name))
        if not paths:
            samples = files.root / name / "samples"
            problems.add("missing image", f"{samples}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
        told = metadata or {"prompt": ""}  # else noted where it was read
        images += [
            ExpectedImage(path, int(name), int(path.stem), told["prompt"], told, is_usable=metadata is not None)
            for path in paths
        ]
    if num_images is not None:
        _check_counts(files, images, num_images, f"--num-images says {num_images}", problems)
    elif images:
        (usual, _), *_ = Counter(Counter(image.index for image in images).values()).most_common(1)
        _check_counts(files, images, usual, f"most have {usual}", problems)
    return images


def _is_sample(path: PurePosixPath, name: str) -> bool:
    is_numbered = path.stem.isdecimal() and path.suffix.lower() in IMAGE_SUFFIXES
    return is_numbered and path.parent == PurePosixPath(name, "samples")


def _check_counts(files: SetFiles, images: list[ExpectedImage], expected: int, why: str, problems: Problems) -> None:
    """Note prompts with another number of images than expected: the sign of an interrupted generation."""
    counts = Counter((image.index, image.prompt) for image in images)
    for (index, prompt), count in counts.items():
        if count != expected:
            problems.add("uneven", f"{files.root}: prompt {index} ({prompt!r}) has {count} images; {why}")
