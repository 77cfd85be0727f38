"""The renderer: geometry, determinism, and pictures worked out by hand."""

import numpy as np
import pytest

from stage_grpo.shapes.scenes import (
    COLORS,
    GRID,
    IMAGE_SIZE,
    JITTER,
    MIN_GAP,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    bounding_box,
    gap,
    render,
    sample_centers,
)


def pixels(*objects: SceneObject, background: int = 228) -> np.ndarray:
    return np.asarray(render(Scene(objects, background))).astype(int)


def test_a_square_fills_exactly_its_bounding_box():
    picture = pixels(SceneObject("square", "red", "small", 16.0, 24.0), background=230)
    expected = np.full((48, 48, 3), 230)
    expected[19:29, 11:21] = COLORS["red"]  # centre (16, 24), 10 px wide: columns 11..20, rows 19..28
    assert np.array_equal(picture, expected)


def test_a_ring_shows_the_background_in_its_hole_and_a_circle_does_not():
    ring = pixels(SceneObject("ring", "blue", "large", 24.0, 24.0))
    circle = pixels(SceneObject("circle", "blue", "large", 24.0, 24.0))
    assert np.array_equal(ring[24, 24], [228] * 3)
    assert np.array_equal(circle[24, 24], COLORS["blue"])
    # Rim of about 0.26 x 14 px: the pixel two in from the left edge is coloured in both.
    assert np.array_equal(ring[24, 19], COLORS["blue"])


def test_a_cross_has_arms_and_empty_corners_and_a_triangle_points_up():
    cross = pixels(SceneObject("cross", "green", "large", 24.0, 24.0))
    assert np.array_equal(cross[24, 17], COLORS["green"]) and np.array_equal(cross[17, 24], COLORS["green"])
    assert np.array_equal(cross[18, 18], [228] * 3)
    triangle = pixels(SceneObject("triangle", "green", "large", 24.0, 24.0))
    assert np.array_equal(triangle[29, 18], COLORS["green"]) and np.array_equal(triangle[18, 18], [228] * 3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_shape_touches_all_sides_of_its_box_and_stays_inside(shape, size):
    obj = SceneObject(shape, "purple", size, 17.0, 31.0)
    drawn = np.argwhere((pixels(obj) != 228).any(-1))
    x1, y1, x2, y2 = bounding_box(obj)
    assert [drawn[:, 1].min(), drawn[:, 0].min()] == [x1, y1]
    assert [drawn[:, 1].max() + 1, drawn[:, 0].max() + 1] == [x2, y2]


def test_sampled_shapes_stay_in_the_picture_keep_their_distance_and_own_their_tokens():
    rng = np.random.default_rng(0)
    for num in (1, 2, 3, 4) * 75:
        sizes = [str(size) for size in rng.choice(list(SIZES), num)]
        objects = [SceneObject("ring", "cyan", s, x, y) for s, (x, y) in zip(sizes, sample_centers(rng, sizes))]
        tokens: set[tuple[int, int]] = set()
        for i, obj in enumerate(objects):
            assert min(abs(obj.x - g) for g in GRID) <= JITTER and min(abs(obj.y - g) for g in GRID) <= JITTER
            x1, y1, x2, y2 = (int(edge) for edge in bounding_box(obj))
            own = {(x // 8, y // 8) for x in range(x1, x2) for y in range(y1, y2)}
            assert len(own) <= 4 and not own & tokens
            tokens |= own
            assert all(gap(obj, other) >= MIN_GAP for other in objects[:i])


def test_equal_scenes_and_equal_seeds_give_equal_pixels():
    obj = SceneObject("circle", "yellow", "small", 8.0, 40.0)
    assert render(Scene((obj,))).tobytes() == render(Scene((obj,))).tobytes()
    first, second = (sample_centers(np.random.default_rng(5), ["small"] * 4) for _ in range(2))
    assert first == second
    assert first != sample_centers(np.random.default_rng(6), ["small"] * 4)


def test_gap_by_hand():
    a = SceneObject("square", "red", "small", 10.0, 10.0)  # 5..15
    b = SceneObject("square", "red", "large", 25.0, 12.0)  # x from 18
    assert gap(a, b) == gap(b, a) == 3.0
    assert gap(a, a) == -10.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("star", "red", "small", 24.0, 24.0), "shape='star'"),
        (("ring", "pink", "small", 24.0, 24.0), "color='pink'"),
        (("ring", "red", "tiny", 24.0, 24.0), "size='tiny'"),
        (("ring", "red", "large", 4.0, 24.0), "leaves the 48 x 48"),
        (("ring", "red", "large", 24.0, IMAGE_SIZE - 3.0), "leaves the 48 x 48"),
    ],
)
def test_impossible_objects_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneObject(*arguments)


def test_impossible_scenes_are_named():
    with pytest.raises(ValueError, match="background=256"):
        Scene((), 256)
    with pytest.raises(ValueError, match="5 objects do not fit"):
        sample_centers(np.random.default_rng(0), ["small"] * 5)
