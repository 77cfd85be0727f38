"""The shapes detector: exact on drawn scenes, steady under small damage, strict on what is no shape."""

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from transformers import JanusForConditionalGeneration

from stage_grpo.rewards.geneval import judge
from stage_grpo.shapes import detector
from stage_grpo.shapes.detector import UNKNOWN_COLOR, ShapesDetector
from stage_grpo.shapes.prompts import rows, sample_scene
from stage_grpo.shapes.scenes import COLORS, SHAPES, SIZES, Scene, SceneObject, bounding_box, render

TINY_POLICY = Path(__file__).parents[1] / "assets" / "tiny-janus-shapes"
DETECTOR = ShapesDetector()
NUM_SCENES = 400


def drawn(shape="circle", color="blue", size="large", x=24.0, y=24.0):
    return render(Scene((SceneObject(shape, color, size, x, y),)))


def pixels(image):
    return np.array(image, dtype=np.float64)


def picture(values):
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def seen(image):
    found = DETECTOR.detect([image])[0]
    return sorted((name, color) for (name, _), color in found.box_colors.items())


def asked(scene):
    return sorted((part.shape, part.color) for part in scene.objects)


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    heldout = rows("heldout")
    chosen = [heldout[i] for i in rng.integers(0, len(heldout), NUM_SCENES)]
    return [(row, sample_scene(row, rng)) for row in chosen]


def share_exact(scenes, damage):
    rng = np.random.default_rng(1)
    return np.mean([seen(damage(render(scene), rng)) == asked(scene) for _, scene in scenes])


def test_every_clean_heldout_scene_is_exactly_right(scenes):
    assert share_exact(scenes, lambda image, rng: image) == 1.0
    for row, scene in scenes[:100]:
        found = DETECTOR.detect([render(scene)])[0]
        verdict = judge(found.objects, row.metadata, found.colors)
        assert (verdict.correct, verdict.score) == (True, 1.0), (row, scene)


def test_boxes_lie_where_the_shapes_are(scenes):
    for _, scene in scenes[:100]:
        found = DETECTOR.detect([render(scene)])[0]
        for part in scene.objects:
            true = np.array(bounding_box(part))
            errors = [np.abs(np.array(box[:4]) - true).max() for box in found.objects[part.shape]]
            assert min(errors) <= 2.0, (part, found.objects)


@pytest.mark.parametrize(
    "damage",
    [
        lambda image, rng: picture(pixels(image) + rng.normal(0, 16, (48, 48, 3))),
        lambda image, rng: image.filter(ImageFilter.GaussianBlur(1.0)),
        lambda image, rng: picture(pixels(image) + rng.uniform(-20, 20, 3)),
        lambda image, rng: picture(np.where(rng.random((48, 48, 1)) < 0.02, 228, pixels(image))),
    ],
    ids=["noise", "blur", "color_shift", "dropped_pixels"],
)
def test_small_damage_changes_nothing(scenes, damage):
    assert share_exact(scenes[:150], damage) >= 0.99


@pytest.mark.parametrize(("shape", "color", "size"), list(product(SHAPES, COLORS, SIZES)))
def test_every_shape_color_and_size(shape, color, size):
    found = DETECTOR.detect([drawn(shape, color, size, 16.0, 32.0)])[0]
    (box,) = found.objects[shape]
    assert list(found.objects) == [shape]
    assert found.colors(shape, [box]) == [color]
    assert 0.9 < box.confidence <= 1.0


def test_templates_of_another_size_are_left_out_of_the_comparison_without_loss():
    """Against all templates, on coverages from whole to hardly recognisable."""
    templates, areas = detector._templates()
    draws, verdicts = np.random.default_rng(0), []
    for index in draws.integers(len(templates), size=300):
        noise = draws.normal(0, draws.uniform(0, 0.5), (22, 22))
        patch = np.clip(templates[index].reshape(22, 22) + noise, 0, 1).astype(np.float32)
        flat = detector._sharpen(patch.reshape(-1))
        shared = np.minimum(templates, flat).sum(axis=1)
        overlaps = shared / (areas + flat.sum() - shared)
        by_shape = overlaps.reshape(len(SHAPES), -1).max(axis=1)
        second, best = np.sort(by_shape)[-2:]
        quarters = detector._quarter_overlaps(flat, templates[overlaps.argmax()])
        clear = best >= 0.85 and best - second >= 0.04 and quarters.min() >= 0.7
        verdicts.append(clear)
        shape, overlap = detector._match(patch)
        assert shape == (SHAPES[by_shape.argmax()] if clear else None)
        assert overlap == best or not clear
    assert 50 < sum(verdicts) < 250


def test_specks_are_no_objects():
    values = pixels(drawn("ring", "red"))
    values[4:7, 4:7] = COLORS["blue"]
    values[40:44, 2:5] = COLORS["green"]
    assert seen(picture(values)) == [("ring", "red")]


@pytest.mark.parametrize(("shape", "size", "corner"), list(product(SHAPES, SIZES, range(4))))
def test_a_shape_without_a_quarter_is_none(shape, size, corner):
    values = pixels(drawn(shape, size=size))
    top, left = 24 * (corner // 2), 24 * (corner % 2)
    values[top : top + 24, left : left + 24] = 228
    assert seen(picture(values)) == []


@pytest.mark.parametrize(("shape", "size", "across"), list(product(SHAPES, SIZES, (True, False))))
def test_half_a_shape_is_none(shape, size, across):
    values = pixels(drawn(shape, size=size))
    values[(slice(24, 48), slice(None)) if across else (slice(None), slice(24, 48))] = 228
    assert seen(picture(values)) == []


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("other", ["red", "purple", "yellow"])
def test_a_shape_of_two_colors_is_none(shape, other):
    values = pixels(drawn(shape, "blue"))
    values[24:] = pixels(drawn(shape, other))[24:]
    assert seen(picture(values)) == []


@pytest.mark.parametrize(("a", "b"), [("circle", "square"), ("circle", "triangle"), ("ring", "circle")])
def test_half_one_shape_half_another_is_neither(a, b):
    values = pixels(drawn(a))
    values[:, 24:] = pixels(drawn(b))[:, 24:]
    assert seen(picture(values)) == []


def test_a_ring_filled_with_another_color_is_no_ring():
    values = pixels(drawn("ring", "blue"))
    values[20:28, 20:28] = COLORS["red"]
    assert ("ring", "blue") not in seen(picture(values))


def test_touching_shapes_are_not_counted():
    left, right = pixels(drawn(x=17.0)), pixels(drawn(x=31.0))
    assert seen(picture(np.minimum(left, right))) == []


@pytest.mark.parametrize("extent", [4, 6, 20, 30, 48])
def test_sizes_of_another_world_are_none(extent):
    values = np.full((48, 48, 3), 228.0)
    values[:extent, :extent] = COLORS["red"]
    assert seen(picture(values)) == []


def test_pale_shapes_lose_their_color_then_themselves():
    blank, full = render(Scene(())), drawn("square", "red")
    assert seen(Image.blend(blank, full, 0.9)) == [("square", "red")]
    assert seen(Image.blend(blank, full, 0.6)) == [("square", UNKNOWN_COLOR)]
    assert seen(Image.blend(blank, full, 0.4)) == []


def test_colors_outside_the_world_have_no_name():
    values = pixels(drawn("circle", "red"))
    gray = np.abs(values - 228).max(axis=-1) > 60
    values[gray] = 60
    assert [color for _, color in seen(picture(values))] == [UNKNOWN_COLOR]


@pytest.mark.parametrize("scale", [2, 8])
def test_other_sizes_are_scaled_to_the_world(scenes, scale):
    for _, scene in scenes[:20]:
        image = render(scene)
        large = image.resize((48 * scale, 48 * scale), Image.Resampling.NEAREST)
        assert DETECTOR.detect([large]) == DETECTOR.detect([image])


def test_boxes_fall_in_confidence_and_batches_change_nothing(scenes):
    rng = np.random.default_rng(2)
    images = [picture(pixels(render(scene)) + rng.normal(0, 12, (48, 48, 3))) for _, scene in scenes[:40]]
    together = DETECTOR.detect(images)
    assert together == [DETECTOR.detect([image])[0] for image in images]
    for found in together:
        for boxes in found.objects.values():
            assert all(a.confidence >= b.confidence for a, b in pairwise(boxes))


def test_no_picture_raises_and_noise_shows_nothing():
    rng = np.random.default_rng(3)
    noise = [picture(rng.integers(0, 256, (height, width, 3))) for height, width in [(48, 48), (1, 1), (7, 300)]]
    flat = [Image.new("RGB", (48, 48), color) for color in [*COLORS.values(), (0, 0, 0), (255, 255, 255)]]
    modes = [drawn().convert(mode) for mode in ("L", "RGBA", "P", "1")]
    blocks = [picture(np.kron(rng.integers(0, 256, (12, 12, 3)), np.ones((4, 4, 1)))) for _ in range(50)]
    assert all(not found.objects for found in DETECTOR.detect(noise + flat))
    found = DETECTOR.detect(modes + blocks)
    assert len(found) == 54
    assert all(0 <= box.confidence <= 1 for one in found for boxes in one.objects.values() for box in boxes)


@pytest.mark.filterwarnings("error")
def test_a_medley_whose_median_is_the_background_is_no_object():
    values = np.full((48, 48, 3), 228.0)
    # Thirds of cyan, magenta and yellow: each channel's median over the piece is the background's.
    for channel in range(3):
        values[10:22, 10 + 4 * channel : 14 + 4 * channel, channel] = 40
    assert seen(picture(values)) == []


def test_colors_of_a_foreign_box_are_an_error():
    found = DETECTOR.detect([drawn()])[0]
    with pytest.raises(KeyError):
        found.colors("square", found.objects["circle"])


def test_round_trips_through_the_shipped_tokenizer(scenes):
    tokenizer = JanusForConditionalGeneration.from_pretrained(TINY_POLICY).model.vqmodel.eval()
    images = [render(scene) for _, scene in scenes]
    inputs = torch.tensor(np.stack([pixels(image) for image in images]), dtype=torch.float32) / 127.5 - 1
    with torch.no_grad():
        codes = tokenizer.encode(inputs.permute(0, 3, 1, 2)).image_tokens.view(len(images), -1)
        decoded = tokenizer.decode(codes)
    seen_again = [picture(values) for values in (decoded.permute(0, 2, 3, 1).numpy() + 1) * 127.5]
    correct = []
    for (row, _), image in zip(scenes, seen_again):
        found = DETECTOR.detect([image])[0]
        correct.append(judge(found.objects, row.metadata, found.colors).correct)
    assert np.mean(correct) >= 0.95
