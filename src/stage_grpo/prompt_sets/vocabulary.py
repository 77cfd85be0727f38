"""Words of GenEval's prompts: names, colours, relations, numbers, articles and plurals. Source: arXiv:2310.11513."""

from __future__ import annotations

_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
OBJECT_NAMES = tuple(" ".join(_NAMES.split()).split(", "))
"""The benchmark's names of COCO's 80 classes, in COCO's order."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MIRRORS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
"""Each relation with the one that says the same of the objects in exchanged roles."""
PLURALS = ("english", "benchmark")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MAX_COUNT = len(NUMBERS) + 1
"""Largest count that has a word here."""
_IRREGULAR = {
    "person": "people",
    "sheep": "sheep",
    "knife": "knives",
    "computer mouse": "computer mice",
    "skis": "pairs of skis",
    "scissors": "pairs of scissors",
}


def with_article(name: str) -> str:
    """Puts "a" or "an" before a name, by its first letter, as the benchmark does ("a skis" included)."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def plural(name: str, style: str = "english") -> str:
    """The plural of one of ``OBJECT_NAMES``; "benchmark" knows two endings only ("two benchs")."""
    if style == "english" and name in _IRREGULAR:
        return _IRREGULAR[name]
    hisses = name.endswith("s") or (style == "english" and name.endswith(("ch", "sh")))
    return f"{name}es" if hisses else f"{name}s"
