"""Draw texts that are known, let the reward `ocr` read them, and print how often and how fast it reads right.

    python benchmarks/ocr_reading.py --num 300 --out outputs/ocr_reading

Four kinds of pictures, as many of each: dark text on a light ground, text on a ground as busy as a photograph, text
turned by up to 12 degrees on such a ground, and text with 1 to 3 letters exchanged. Every reward is compared with
the formula applied to what was read, by an edit distance written here. With `--out`, pictures and prompts stay there
for `stage score --reward ocr --images OUT/images --prompts OUT/prompts.txt`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from stage_grpo.rewards.ocr import OcrOptions, OcrReward

KINDS = ("plain", "photo", "rotated", "typos")
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono")
TEXTS = (
    "Fresh Bread Daily", "Mind the Gap", "Happy Birthday Anna", "Platform 9", "Welcome to Norway", "No Swimming",
    "Exit 42", "Open Until Late", "Blue Lagoon Cafe", "Keep Calm", "Night Market", "Runway 27 Left", "Grand Opening",
    "Chess Club 1987", "Do Not Disturb", "Lost and Found", "Sunday Jazz", "Half Price Books", "Quiet Please",
    "Winter Sale", "Robot Parking Only", "Meet at Noon", "Level 3 Complete", "The Last Train", "Moon Base Alpha",
)  # fmt: skip
SIDE = 384


class Picture(NamedTuple):
    """A drawn text: what the prompt asks for, what stands there, and how many letters of it were exchanged."""

    kind: str
    image: Image.Image
    wanted: str
    drawn: str
    num_typos: int

    @property
    def prompt(self) -> str:
        return f'a sign that says "{self.wanted}"'


def pictures(num: int, seed: int = 0) -> Iterator[Picture]:
    """The first ``num`` pictures of an endless series; each depends on ``seed`` and its own number alone."""
    for index in range(num):
        rng = np.random.default_rng([seed, index])
        kind, wanted = KINDS[index % len(KINDS)], TEXTS[index // len(KINDS) % len(TEXTS)]
        num_typos = int(rng.integers(1, 4)) if kind == "typos" else 0
        drawn = with_typos(wanted, num_typos, rng)
        ground = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in rng.integers(200, 256, 3)))
        ink = tuple(int(v) for v in rng.integers(0, 70, 3))
        if kind in ("photo", "rotated"):
            ground, ink = photo_like(rng), (255, 255, 255)
        angle = float(rng.uniform(-12, 12)) if kind == "rotated" else 0.0
        yield Picture(kind, write(ground, drawn, ink, angle, rng), wanted, drawn, num_typos)


def with_typos(text: str, num: int, rng: np.random.Generator) -> str:
    """Exchange ``num`` letters for some that the text does not have: the edit distance is then exactly ``num``."""
    strangers = [letter for letter in "abdeghmnpqrstu" if letter not in text.lower()]
    letters = list(text)
    places = [i for i, letter in enumerate(letters) if letter.islower()]
    for place in rng.choice(places, num, replace=False):
        letters[place] = strangers[int(rng.integers(len(strangers)))]
    return "".join(letters)


def photo_like(rng: np.random.Generator) -> Image.Image:
    """Colour noise of several scales, darkened so that white text is readable: (384, 384) RGB."""
    ground = np.zeros((SIDE, SIDE, 3))
    for cells in (3, 6, 12, 48, 192):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        ground += np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=float) / cells
    ground = (ground - ground.min()) / (ground.max() - ground.min()) * 170
    return Image.fromarray(ground.astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))


def write(ground: Image.Image, text: str, ink: tuple[int, ...], angle: float, rng: np.random.Generator) -> Image.Image:
    """Write centred lines of one or two words; ``angle`` in degrees, counterclockwise."""
    words = text.split(" ")
    cut = (len(words) + 1) // 2 if len(text) > 12 else len(words)
    lines = [" ".join(line) for line in (words[:cut], words[cut:]) if line]
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{FONTS[int(rng.integers(len(FONTS)))]}.ttf")
    size = next(s for s in range(64, 8, -2) if max(ImageFont.truetype(path, s).getlength(x) for x in lines) < 300)
    layer = Image.new("L", ground.size)
    ImageDraw.Draw(layer).multiline_text(
        (SIDE / 2, SIDE / 2),
        "\n".join(lines),
        255,
        ImageFont.truetype(path, size),
        "mm",
        spacing=size / 3,
        align="center",
    )
    layer = layer.rotate(angle, Image.Resampling.BICUBIC)
    written = ground.copy()
    written.paste(Image.new("RGB", ground.size, ink), mask=layer)
    return written


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance by his own recurrence: independent of the library that the reward uses."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def formula(read: str, wanted: str) -> float:
    """The paper's reward of a recognised text."""
    read, wanted = ("".join(text.lower().split()) for text in (read, wanted))
    return max(1 - edit_distance(read, wanted) / len(wanted), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--detection-side", type=int, default=OcrOptions.detection_side)
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    drawn = list(pictures(args.num, args.seed))
    if args.out is not None:
        save(drawn, args.out)
    reward = OcrReward(OcrOptions(detection_side=args.detection_side, num_threads=args.num_threads))
    reward.score([drawn[0].image], [drawn[0].prompt])  # loads the engine
    print(
        f"{'kind':8} {'images':>6} {'read exactly':>12} {'mean reward':>11} {'if read exactly':>15} {'s / image':>9}"
    )
    rows = []
    for kind in KINDS:
        chosen = [picture for picture in drawn if picture.kind == kind]
        start = time.perf_counter()
        results = reward.score([p.image for p in chosen], [p.prompt for p in chosen])
        seconds = (time.perf_counter() - start) / len(chosen)
        for picture, score, read in zip(chosen, results.scores, results.details["read"]):
            assert score == formula(read, picture.wanted), (read, picture.wanted, score)
            rows.append((kind, read, picture, score, seconds))
        report(kind, [row for row in rows if row[0] == kind])
    report("all", rows)
    print("every reward equals max(1 - edit distance / characters, 0) of the recognised text")


def report(kind: str, rows: list[tuple[str, str, Picture, float, float]]) -> None:
    exact = np.mean([formula(read, picture.drawn) == 1 for _, read, picture, _, _ in rows])
    ideal = np.mean([formula(picture.drawn, picture.wanted) for _, _, picture, _, _ in rows])
    reward, seconds = (np.mean([row[column] for row in rows]) for column in (3, 4))
    print(f"{kind:8} {len(rows):6} {exact:12.3f} {reward:11.3f} {ideal:15.3f} {seconds:9.3f}", flush=True)


def save(drawn: list[Picture], out: Path) -> None:
    (out / "images").mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(drawn):
        picture.image.save(out / "images" / f"{index:05}.png")
    (out / "prompts.txt").write_text("".join(f"{picture.prompt}\n" for picture in drawn), encoding="utf-8")


if __name__ == "__main__":
    main()
