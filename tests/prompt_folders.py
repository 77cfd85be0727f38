"""Writes images as another program would that follows GenEval's layout: no manifest, nothing in the files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def write_prompt_folder(images_dir: Path, index: int, metadata: dict[str, Any], images: Sequence[Image.Image]) -> Path:
    folder = images_dir / f"{index:05d}"
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        image.save(folder / "samples" / f"{number:05d}.png")
    (folder / "metadata.jsonl").write_text(json.dumps(metadata, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder
