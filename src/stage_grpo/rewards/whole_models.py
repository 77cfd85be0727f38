"""Models of rewards stay whole while a run trains with ZeRO-3."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOCK = threading.Lock()
_hidden: list[Any] = []
"""What every block that is open found, the first one the configuration; blocks of several threads may overlap."""


@contextmanager
def whole_models() -> Iterator[None]:
    """Inside this context transformers' ``from_pretrained`` leaves no process a share of a model alone.

    With ZeRO-3 it does so with every model that is loaded, since it knows of one DeepSpeed configuration a process.
    """
    transformers_side: Any = sys.modules.get("transformers.integrations.deepspeed")
    if transformers_side is None:  # nobody can have set a configuration
        yield
        return
    with _LOCK:
        _hidden.append(transformers_side._hf_deepspeed_config_weak_ref)
        transformers_side._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        with _LOCK:
            known = _hidden.pop()
            if not _hidden:
                transformers_side._hf_deepspeed_config_weak_ref = known
