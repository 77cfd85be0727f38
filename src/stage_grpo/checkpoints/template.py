"""The prompt template that a checkpoint was trained with, from the records beside its weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from stage_grpo.checkpoints.manifest import MANIFEST

MERGE = "merge.json"
"""What a merged checkpoint was made from."""
_RUN = "run.json"


def trained_template(model: str | Path) -> str | None:
    """Prompt template that a run was trained with, or None if the folder is no run's and was not made from one's.

    Args:
        model: A run's folder or one within it (``checkpoint-N``, ``best``, ``ema``), what ``stage merge`` or ``stage
            convert`` made of it, or any other model.
    """
    if not Path(model).is_dir():
        return None
    folder = Path(os.path.abspath(model))
    for record in (folder / MANIFEST, folder / MERGE, folder / _RUN, folder.parent / _RUN):
        try:
            content: Any = json.loads(record.read_text(encoding="utf-8"))
            template = (content["config"] if record.name == _RUN else content)["prompt_template"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(template, str):
            return template
    return None
