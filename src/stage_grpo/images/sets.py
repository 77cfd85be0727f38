"""A folder of generated images as an evaluation sees it: the images that can be scored, and all that is wrong.

Every image is decoded once, so that a torn file shows before an hour of scoring and not after it. What is expected
comes from the prompts if they are known, else from the set's manifest, else from what its folders say of themselves;
see `stage_grpo.images.expectations`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from tqdm import tqdm

from stage_grpo.benchmarks import Benchmark
from stage_grpo.checksums import sha256_of
from stage_grpo.devices import num_cores
from stage_grpo.images.expectations import ExpectedImage, expected_images
from stage_grpo.images.files import read_about
from stage_grpo.images.folders import IMAGE_SUFFIXES, load_image
from stage_grpo.images.layouts import LAYOUTS
from stage_grpo.images.problems import Problems
from stage_grpo.images.set_files import SetFiles, read_files
from stage_grpo.types import Metadata, PromptRow

_THREADS = 8


@dataclass(frozen=True)
class SetImage:
    """One image that can be scored.

    Attributes:
        path: Where it is, from the folder of the set, with forward slashes.
        index: Place of its prompt.
        sample: Which image of the prompt, from 0.
        prompt: What it was made from.
        metadata: What the prompt asks for; holds "prompt" and "tag".
        digest: SHA-256 of its size and pixels.
    """

    path: str
    index: int
    sample: int
    prompt: str
    metadata: Metadata
    digest: str


@dataclass(frozen=True)
class ImageSet:
    """A set of images.

    Attributes:
        folder: Where it is.
        side: Folder of what describes it; the same, or a sibling.
        images: The images that can be scored, in the order of the prompts.
        problems: What is wrong, the first few lines of every kind; empty for a whole set.
        num_problems: How many problems there are in all.
        source: Where the prompts come from: "prompts", "manifest" or "folders".
        generation: What ``generation.json`` says; empty if there is none.
    """

    folder: Path
    side: Path
    images: list[SetImage]
    problems: list[str]
    num_problems: int
    source: str
    generation: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every image's place, pixels and prompt: equal for equal sets alone."""
        digest = hashlib.sha256()
        for image in self.images:
            parts = [image.path, image.prompt, image.metadata, image.digest]
            digest.update(json.dumps(parts, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    def check_whole(self) -> None:
        """Refuse a set that is not whole.

        Raises:
            ValueError: Something is wrong; the first few of every kind are listed.
        """
        if self.problems:
            listed = "\n".join(f"  {problem}" for problem in self.problems)
            raise ValueError(
                f"{self.folder} cannot be evaluated, {self.num_problems} problem(s):\n{listed}\n"
                "repair them, or score what there is by --allow-partial"
            )


@dataclass
class _Checked:
    """What became of one expected image.

    Attributes:
        path: Where it really is.
        digest: SHA-256 of size and pixels; None if the image cannot be scored.
        size: Width and height, pixels.
        is_vouched: Whether the file itself says that it was made from this prompt.
        problems: Kind and message of what is wrong.
    """

    path: PurePosixPath
    digest: str | None = None
    size: tuple[int, int] | None = None
    is_vouched: bool = False
    problems: list[tuple[str, str]] = field(default_factory=list)


def read_image_set(
    benchmark: Benchmark,
    images_dir: str | Path,
    rows: Sequence[PromptRow] | None = None,
    num_images: int | None = None,
) -> ImageSet:
    """Read a set and find everything that is wrong with it, in one pass.

    Args:
        benchmark: The benchmark; its layout says where images lie.
        images_dir: Folder of the set.
        rows: The prompts; by default what the set says of itself.
        num_images: Images of each; by default what the set says, or what most prompts have.

    Returns:
        The set. Images that are missing, unreadable or made from another prompt are not among its images.

    Raises:
        ValueError: There is no folder, it is empty, or nothing says what its images were made from.
    """
    problems = Problems()
    files = read_files(Path(images_dir), LAYOUTS[benchmark.layout], problems)
    expected, source = expected_images(benchmark, files, rows, num_images, problems)
    any_suffix = benchmark.layout == "flat"
    located = [(image, _locate(image.path, files)) for image in expected]
    with ThreadPoolExecutor(min(_THREADS, num_cores())) as pool:
        work = pool.map(lambda pair: _check(files, pair[0], pair[1], any_suffix), located)
        checked = list(tqdm(work, total=len(located), desc="check images", unit="image", disable=None))
    for result in checked:
        for kind, message in result.problems:
            problems.add(kind, message)
    _check_sizes(files, checked, problems)
    _check_duplicates(expected, checked, problems)
    _check_extra(benchmark, files, {path for _, path in located}, problems)
    images = [
        SetImage(result.path.as_posix(), image.index, image.sample, image.prompt, image.metadata, result.digest)
        for image, result in zip(expected, checked)
        if result.digest is not None
    ]
    return ImageSet(files.root, files.side, images, problems.lines(), len(problems), source, files.generation)


def _locate(path: PurePosixPath, files: SetFiles) -> PurePosixPath:
    """Where an expected image is: there, or beside under another kind of image's suffix."""
    if path in files.found:
        return path
    others = [path.with_name(path.stem + suffix) for suffix in IMAGE_SUFFIXES]
    return next((other for other in others if other in files.found), path)


def _check(files: SetFiles, image: ExpectedImage, path: PurePosixPath, any_suffix: bool) -> _Checked:
    result = _Checked(path)
    full = files.root / path
    if not image.is_usable:
        return result
    if path not in files.found:
        if not full.is_symlink():  # noted as a link already
            result.problems.append(("missing image", f"{full}: missing; generate it again"))
        return result
    if not full.exists():
        result.problems.append(("link", f"{full}: a link to nothing; generate this image again"))
        return result
    if path != image.path and not any_suffix:
        result.problems.append(
            ("other type", f"{full}: the benchmark's own scorer reads {image.path.suffix} only; save it as such")
        )
    if full.stat().st_size == 0:
        result.problems.append(("empty file", f"{full}: not an image, 0 bytes; generate this image again"))
        return result
    try:
        picture, about = load_image(full), read_about(full)
    except ValueError as error:
        result.problems.append(("unreadable", str(error)))
        return result
    result.size = picture.size
    if image.sha256 is not None and sha256_of(full) != image.sha256:
        result.problems.append(("altered", f"{full}: not the file of the manifest; generate this image again"))
    wanted = {"prompt": image.prompt, "index": image.index, "sample": image.sample}
    differing = [key for key, value in wanted.items() if about.get(key, value) != value]
    if differing:
        said = ", ".join(f"{key} {about[key]!r} for {wanted[key]!r}" for key in differing)
        result.problems.append(("other prompt", f"{full}: the file says {said}; generate this image again"))
    result.is_vouched = "prompt" in about and not differing
    if "prompt" not in differing:
        result.digest = _digest(picture)
    return result


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def _check_sizes(files: SetFiles, checked: list[_Checked], problems: Problems) -> None:
    """Whether all images have the size of their generation, else that of most."""
    sizes = Counter(result.size for result in checked if result.size is not None)
    if not sizes:
        return
    said = files.generation.get("image_size")
    usual = _as_size(said) or sizes.most_common(1)[0][0]
    for result in checked:
        if result.size is not None and result.size != usual:
            (width, height), where = result.size, files.root / result.path
            problems.add("wrong size", f"{where}: {width} x {height} pixels, expected {usual[0]} x {usual[1]}")


def _as_size(said: Any) -> tuple[int, int] | None:
    if isinstance(said, int):
        return said, said
    if isinstance(said, list) and len(said) == 2:
        return said[0], said[1]
    return None


def _check_duplicates(expected: list[ExpectedImage], checked: list[_Checked], problems: Problems) -> None:
    """Equal pixels under different prompts: a file copied to the wrong place.

    Files that say themselves that they were made from their prompts are equal because the model repeats itself.
    """
    by_digest: dict[str, list[int]] = defaultdict(list)
    for place, result in enumerate(checked):
        if result.digest is not None:
            by_digest[result.digest].append(place)
    for places in by_digest.values():
        first = places[0]
        for place in places[1:]:
            is_copy = expected[place].prompt != expected[first].prompt
            if is_copy and not (checked[first].is_vouched and checked[place].is_vouched):
                problems.add(
                    "duplicate",
                    f"{checked[place].path}: the same picture as {checked[first].path}, which has another prompt; "
                    "generate both again",
                )


def _check_extra(benchmark: Benchmark, files: SetFiles, known: set[PurePosixPath], problems: Problems) -> None:
    """Images that belong to no prompt, where an official scorer would count them."""
    layout = LAYOUTS[benchmark.layout]
    folders = {path.parent for path in known}
    for path in sorted(files.found - known):
        in_prompt_folder = layout.describes_prompts and len(path.parts) == 3 and path.parts[0].isdigit()
        in_place = path.parent in folders or (in_prompt_folder and path.parts[1] == "samples")
        if in_place and path.suffix.lower() in IMAGE_SUFFIXES:
            problems.add("extra image", f"{files.root / path}: belongs to no prompt; remove it")
    if not layout.shares_folder:
        for name in sorted(set(files.entries) - {path.parts[0] for path in known}):
            problems.add("extra entry", f"{files.root / name}: the official scorer takes it for a style; remove it")
