"""Noun phrases of a prompt, as T2I-CompBench finds them with spaCy.

Source: arXiv:2307.06350, ``BLIPvqa_eval/BLIP_vqa.py`` of github.com/Karine-Huang/T2I-CompBench.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from stage_grpo.types import Metadata

KEY = "noun_phrases"
"""Of the metadata: a list of phrases that is taken instead of spaCy's."""
NO_THINGS = ("top", "the side", "the left", "the right")
"""Noun phrases that name a place, not a thing; the benchmark leaves out exactly these."""
MOST_PHRASES = 8
"""The benchmark asks about the first so many phrases of a prompt and leaves out the rest."""


def phrases_of(prompt: str, metadata: Metadata, spacy_model: str | None) -> list[str]:
    """Phrases to ask about: those that the metadata name, else those that spaCy finds.

    Args:
        prompt: The prompt.
        metadata: May hold ``"noun_phrases": ["a red apple", ...]``, which is taken whole.
        spacy_model: Name or folder of a spaCy pipeline with a parser; None: only the metadata are looked at.

    Raises:
        ValueError: The metadata's phrases are no list of texts; or there are none, and spaCy or its model is missing.
    """
    given = metadata.get(KEY)
    if given is not None:
        if not isinstance(given, list) or not all(isinstance(phrase, str) and phrase.strip() for phrase in given):
            raise ValueError(f"metadata of {prompt!r} hold {KEY}={given!r}; give a list of phrases")
        return list(given)
    if spacy_model is None:
        raise ValueError(f"metadata of {prompt!r} hold no {KEY!r}; add them, or let spaCy find them by spacy_model")
    return noun_phrases(_pipeline(spacy_model)(prompt))


def noun_phrases(doc: Any) -> list[str]:
    """At most eight noun phrases of a text that spaCy has parsed, in their order, repetitions kept.

    Args:
        doc: A ``spacy.tokens.Doc``.
    """
    return [chunk.text for chunk in doc.noun_chunks if chunk.text not in NO_THINGS][:MOST_PHRASES]


def check_spacy(spacy_model: str) -> None:
    """Sees that spaCy and its model are installed, without loading them.

    Raises:
        ValueError: One of them is missing; the message says how to get it, and how to do without.
    """
    remedy = f"(or put {KEY!r} into the metadata, with the option spacy_model: null)"
    if importlib.util.find_spec("spacy") is None:
        raise ValueError(
            f"noun phrases need spaCy, which is not installed; pip install 'stage-grpo[t2i_compbench]' {remedy}"
        )
    from spacy.util import is_package  # pyright: ignore[reportMissingImports]

    if not is_package(spacy_model) and not Path(spacy_model).is_dir():
        raise ValueError(
            f"spaCy's model {spacy_model!r} is not installed; python -m spacy download {spacy_model} {remedy}"
        )


@cache
def _pipeline(spacy_model: str) -> Any:
    check_spacy(spacy_model)
    import spacy  # pyright: ignore[reportMissingImports]

    return spacy.load(spacy_model)
