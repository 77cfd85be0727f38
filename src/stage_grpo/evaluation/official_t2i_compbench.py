"""Running T2I-CompBench's official scripts: each in its own environment, believed only when its results are whole."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stage_grpo.checksums import sha256_of

logger = logging.getLogger(__name__)

IMAGES_PER_PROMPT = 10
"""What the official 3-in-1 score takes for granted."""
_SHOWN_LINES = 4
_MARK = "fingerprint.txt"
"""Of a folder that the official code runs in: what its links and results were made of."""


@dataclass(frozen=True)
class Step:
    """One official script.

    Attributes:
        folder: Where it must be started, within the checkout.
        script: Its path from there.
        flag: Name of the argument that takes the folder of images.
        result: The file it writes, within the folder of images.
        extra: Further arguments.
        leftovers: What it would take up again from an interrupted run, within the folder of images.
    """

    folder: str
    script: str
    flag: str
    result: str
    extra: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The script within the checkout."""
        return f"{self.folder}/{self.script}".removeprefix("./")

    @property
    def log(self) -> str:
        """Name of its log files, without the ending."""
        return Path(self.script).stem


_BLIP = Step("BLIPvqa_eval", "BLIP_vqa.py", "--out_dir", "annotation_blip/vqa_result.json")
_SPATIAL = Step("UniDet_eval", "2D_spatial_eval.py", "--outpath", "labels/annotation_obj_detection_2d/vqa_result.json")
_SPATIAL_3D = Step(
    "UniDet_eval",
    "3D_spatial_eval.py",
    "--outpath",
    "labels/annotation_obj_detection_3d/vqa_result.json",
    leftovers=("labels/depth",),  # taken for complete as soon as it exists
)
_NUMERACY = Step("UniDet_eval", "numeracy_eval.py", "--outpath", "annotation_num/vqa_result.json")
_CLIP = Step(".", "CLIPScore_eval/CLIP_similarity.py", "--outpath", "annotation_clip/vqa_result.json")
_THREE_IN_ONE = Step("3_in_1_eval", "3_in_1.py", "--outpath", "annotation_3_in_1/vqa_result.json")
_OF_COMPLEX = ("--complex", "True")

STEPS: dict[str, tuple[Step, ...]] = {
    "color": (_BLIP,),
    "shape": (_BLIP,),
    "texture": (_BLIP,),
    "spatial": (_SPATIAL,),
    "3d_spatial": (_SPATIAL_3D,),
    "non_spatial": (_CLIP,),
    "numeracy": (_NUMERACY,),
    "complex": (_BLIP, replace(_SPATIAL, extra=_OF_COMPLEX), replace(_CLIP, extra=_OF_COMPLEX), _THREE_IN_ONE),
}
"""Scripts of each category; the last one's result is its score."""
CATEGORIES = tuple(STEPS)
_LISTS = tuple(f"examples/dataset/complex_val{kind}.txt" for kind in ("", "_spatial", "_action"))
"""What the 3-in-1 score reads beside the results of the others."""


def check_checkout(root: Path, categories: Sequence[str]) -> None:
    """Sees that a folder holds the official code.

    Raises:
        ValueError: It lacks a script or list that one of the categories needs.
    """
    for file in (file for category in categories for file in _files_of(category)):
        if not (root / file).is_file():
            raise ValueError(
                f"{root} lacks {file}, so it is no checkout of github.com/Karine-Huang/T2I-CompBench; set "
                "T2I_COMPBENCH_ROOT to one"
            )


def find_python(python: str) -> str:
    """The whole path of an interpreter.

    Raises:
        ValueError: There is none.
    """
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        raise ValueError(f"there is no interpreter {python!r}; set T2I_COMPBENCH_PYTHON to that of the official code")
    return os.path.abspath(found)  # not resolved: a virtual environment's is a link


def category_run(
    category: str, images: Sequence[tuple[str, Path]], root: Path, python: str, out: Path
) -> list[float | None]:
    """Scores a category by the official code, or reads what an earlier run of the same images and scripts found.

    Args:
        category: One of ``CATEGORIES``.
        images: The name under which the official code sees each image, numbered from 0, and its file.
        root: The checkout.
        python: The interpreter of its environment.
        out: Where results go.

    Returns:
        One score an image; None where the official code gives no number.

    Raises:
        ValueError: A script fails, or scores another number of images than there are.
    """
    fingerprint = _fingerprint(category, images, root)
    result = out / f"{category}.json"
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / f".{category}.lock", timeout=0):
            known = _read_result(result, fingerprint)
            if known is not None:
                logger.info("%s: the scores of %d images are in %s already", category, len(known), result)
                return known
            scores = _run(category, images, fingerprint, root, python, out / "official" / f"{category}_val")
            _write_result(result, category, images, scores, fingerprint)
            return scores
    except Timeout as error:
        raise ValueError(
            f"another process scores {category!r} in {out}; wait for it, or choose another --out"
        ) from error


def _run(
    category: str, images: Sequence[tuple[str, Path]], fingerprint: str, root: Path, python: str, work: Path
) -> list[float | None]:
    _link_images(images, fingerprint, work)
    scores: list[float | None] = []
    for step in STEPS[category]:
        found = _answers(work / step.result, len(images))
        if isinstance(found, str):
            logger.info("%s: %s on %d images", category, step.path, len(images))
            log = _start(step, root, python, work)
            found = _answers(work / step.result, len(images))
            if isinstance(found, str):
                raise ValueError(f"{step.path} ended well, but {found}; its output is in {log}")
        scores = found
    return scores


def _start(step: Step, root: Path, python: str, work: Path) -> Path:
    """Run one script to its end.

    Returns:
        Its log of errors.
    """
    (work / step.result).unlink(missing_ok=True)  # nothing old may pass for its result
    for leftover in step.leftovers:
        shutil.rmtree(work / leftover, ignore_errors=True)
    logs = work / "logs"
    logs.mkdir(exist_ok=True)
    errors = logs / f"{step.log}.stderr.txt"
    # No slash at the end: the script for 3D would then look for its depth maps in the wrong folder.
    command = [python, step.script, step.flag, str(work), *step.extra]
    with (logs / f"{step.log}.stdout.txt").open("wb") as told, errors.open("wb") as warned:
        done = subprocess.run(
            command, cwd=root / step.folder, stdout=told, stderr=warned, stdin=subprocess.DEVNULL, check=False
        )
    if done.returncode != 0:
        lines = [line.strip() for line in errors.read_text(encoding="utf-8", errors="replace").splitlines()]
        last = " | ".join([line for line in lines if line][-_SHOWN_LINES:]) or "nothing on stderr"
        raise ValueError(f"{step.path} failed with exit code {done.returncode}: {last}; all of it is in {errors}")
    return errors


def _answers(file: Path, num_images: int) -> list[float | None] | str:
    """The scores of a result file in the order of its question_id, or what keeps it from being whole."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        answers = {int(row["question_id"]): float(row["answer"]) for row in rows}
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        return f"{file} is no list of results ({type(error).__name__}: {error})"
    if len(rows) != num_images or answers.keys() != set(range(num_images)):
        return f"{file} has {len(rows)} results, of {len(answers)} images, where there are {num_images} images"
    ordered = [answers[place] for place in range(num_images)]
    return [score if math.isfinite(score) else None for score in ordered]


def _link_images(images: Sequence[tuple[str, Path]], fingerprint: str, work: Path) -> None:
    """Make the folder that the official code sees, unless it is there for the same images."""
    mark = work / _MARK
    if mark.is_file() and mark.read_text(encoding="utf-8") == fingerprint:
        return
    if work.exists() and not mark.is_file():
        raise ValueError(f"{work} was not made by this command; move it away, or choose another --out")
    partial = work.with_name(f".{work.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "samples").mkdir(parents=True)
    for name, path in images:
        (partial / "samples" / name).symlink_to(path)
    (partial / _MARK).write_text(fingerprint, encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)
    partial.replace(work)


def _files_of(category: str) -> list[str]:
    """Files of the checkout that a category's score depends on and that are ours to check."""
    return [step.path for step in STEPS[category]] + (list(_LISTS) if category == "complex" else [])


def _fingerprint(category: str, images: Sequence[tuple[str, Path]], root: Path) -> str:
    parts = [[name, sha256_of(path)] for name, path in images]
    parts += [[file, sha256_of(root / file)] for file in _files_of(category)]
    return hashlib.sha256(json.dumps([category, parts]).encode()).hexdigest()


def _read_result(file: Path, fingerprint: str) -> list[float | None] | None:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        same = content["fingerprint"] == fingerprint
        return [image["score"] for image in content["images"]] if same else None
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError):
        return None


def _write_result(
    file: Path, category: str, images: Sequence[tuple[str, Path]], scores: Sequence[float | None], fingerprint: str
) -> None:
    known = [score for score in scores if score is not None]
    content = {
        "category": category,
        "mean": math.fsum(known) / len(known) if known else None,
        "num_images": len(images),
        "fingerprint": fingerprint,
        "images": [{"image": path.name, "score": score} for (_, path), score in zip(images, scores, strict=True)],
    }
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)
