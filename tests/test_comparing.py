"""Comparisons: hand-worked differences, scipy as an independent check, refusals, and what each output says."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import stats

from stage_grpo.benchmarks import get_benchmark
from stage_grpo.cli import main
from stage_grpo.comparison.command import main_compare
from stage_grpo.comparison.compare import Side, compare_sides, setting_differences
from stage_grpo.comparison.page import to_html
from stage_grpo.comparison.text import DIFFERENT, MODEL_ONLY, SAME, to_json, to_markdown, to_text
from stage_grpo.evaluation.scores import Scores, clusters, compare, measured, strata, table_lines
from stage_grpo.evaluation.statistics import bootstrap_mean, paired_difference, unpaired_difference

EVIL = 'a|b <script>"x"</script> $x_1$'


def scored(
    name="shapes", value=lambda tag, index, sample: 0.5, prompts=2, samples=1, tags=None, measures=None, **rest
):
    """Scores of ``prompts`` prompts a category, as `stage evaluate` makes them."""
    benchmark = get_benchmark(name)
    measures = measures or benchmark.measures[:1]
    records, index = [], 0
    for tag in tags or benchmark.columns:
        for _ in range(prompts):
            for sample in range(samples):
                got = {measure: value(tag, index, sample) for measure in measures}
                path = f"{index:05d}/samples/{sample:05d}.png"
                record = {"path": path, "index": index, "sample": sample, "prompt": f"prompt {index}", "tag": tag}
                records.append(record | {"scores": got, "reasons": [], "objects": None})
            index += 1
    scores, ci95 = {}, {}
    for measure in measures:
        scores[measure], ci95[measure] = {}, {}
        for line, members in table_lines(benchmark, records).items():
            chosen = [records[i] for i in members]
            got = bootstrap_mean(measured(chosen, measure), strata(benchmark, chosen), clusters(chosen))
            numbers = [None if np.isnan(x) else x for x in (got.value, got.low, got.high)]
            scores[measure][line], ci95[measure][line] = numbers[0], numbers[1:]
    unscored = {m: sum(r["scores"][m] is None for r in records) for m in measures}
    fields = {
        "columns": list(benchmark.columns),
        "num_unscored": unscored,
        "diversity": {"unique_share": None, "pairwise_distance": None, "space": None},
        "missing": {},
        "partial": False,
        "problems": [],
        "settings": {"seed": 0, "generation": {"seed": 0, "sampling": {"guidance_scale": 1.0}, "checkpoint": "a"}},
        "versions": {"torch": "2"},
    }
    return Scores(
        benchmark=benchmark.name,
        scores=scores,
        ci95=ci95,
        num_images=len(records),
        num_prompts=index,
        per_image=records,
        **(fields | rest),
    )


def coin(seed, chance=0.5):
    """A value that depends on the place of the image alone."""
    return lambda tag, index, sample: float(np.random.default_rng((seed, index, sample)).random() < chance)


def sides(*scores, names="ABCDE"):
    return [Side(name, one) for name, one in zip(names, scores)]


def files(tmp_path, *scores):
    paths = [tmp_path / f"{name}.json" for name in "abcde"[: len(scores)]]
    for path, one in zip(paths, scores):
        one.save(path)
    return [str(path) for path in paths]


# The numbers


def test_a_constant_gain_has_an_interval_of_one_point():
    before = scored(value=lambda tag, index, sample: 0.25)
    after = scored(value=lambda tag, index, sample: 1.0 if tag == "counting" else 0.25)
    (table,) = compare_sides(sides(before, after)).tables
    lines = {line.name: line for line in table.lines}
    # Counting gains 0.75, the five others 0: overall 0.75 / 6; held-out leaves out counting and single_object.
    expected = dict.fromkeys(before.columns, 0.0) | {"counting": 0.75, "overall": 0.125, "heldout": 0.0}
    for name, change in expected.items():
        got = lines[name].difference
        assert (got.value, got.low, got.high) == pytest.approx((change, change, change), abs=1e-12)
        # Every resample is above 0: 2 / 4001. Every resample is 0: nothing speaks against "no difference".
        assert got.p_value == pytest.approx(2 / 4001 if change else 1.0, abs=1e-12)
    assert lines["overall"].num_images == (12, 12) and lines["counting"].num_images == (2, 2)
    assert (lines["overall"].before.value, lines["overall"].after.value) == pytest.approx((0.25, 0.375), abs=1e-12)
    text = to_text(compare_sides(sides(before, after)))
    assert re.search(r"^overall +12 +0\.250 +0\.375 +\+0\.125 \[\+0\.125, \+0\.125\] +<0\.001$", text, re.MULTILINE)
    assert re.search(r"^position +2 +0\.250 +0\.250 +\+0\.000 \[\+0\.000, \+0\.000\] +1\.000$", text, re.MULTILINE)


def test_paired_lines_are_those_of_compare():
    before, after = scored(value=coin(1), prompts=8), scored(value=coin(2, 0.7), prompts=8)
    (table,) = compare_sides(sides(before, after), seed=3).tables
    assert {line.name: line.difference for line in table.lines} == compare(before, after, "strict", seed=3)


def test_an_overall_score_over_images_weighs_images_and_not_categories():
    # 1 image of one category gains 1, 7 of the three others gain 0: over images 1/8, over categories 1/4.
    common = get_benchmark("ocr").columns[1]

    def make(gain):
        one = scored("ocr", prompts=2)
        for record in one.per_image:
            record["scores"]["ocr"] = gain if record["index"] == 0 else 0.0
            record["tag"] = common if record["index"] == 1 else record["tag"]
        one.scores["ocr"], one.ci95["ocr"] = {"overall": gain / 8}, {"overall": [0.0, 1.0]}
        return one

    for paired in (True, False):
        (table,) = compare_sides(sides(make(0.0), make(1.0)), paired=paired).tables
        assert [(line.name, line.difference.value) for line in table.lines] == [("overall", 0.125)]


def test_unpaired_difference_by_hand():
    # Before is always 0; resamples of (0, 1) have mean 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    got = unpaired_difference(np.zeros(5), np.array([0.0, 1.0]), confidence=0.6)
    assert (got.value, got.low, got.high) == (0.5, 0.0, 1.0)
    # p = 2 P(change <= 0) = 1/2; of 4000 draws its spread is 2 sqrt(3/16 / 4000) = 0.0137.
    assert abs(got.p_value - 0.5) < 0.06
    got = unpaired_difference(np.zeros(3), np.ones(2))
    assert (got.value, got.low, got.high, got.p_value) == (1.0, 1.0, 1.0, pytest.approx(2 / 4001))


def test_unpaired_difference_agrees_with_scipy():
    rng = np.random.default_rng(0)
    before, after = rng.normal(0, 1, 80), rng.normal(0.3, 2, 120)
    ours = unpaired_difference(before, after, num_resamples=40_000)
    theirs = stats.bootstrap(
        (before, after),
        lambda a, b, axis: b.mean(axis=axis) - a.mean(axis=axis),
        n_resamples=40_000,
        method="percentile",
        rng=np.random.default_rng(1),
        batch=2000,
    ).confidence_interval
    # The difference has spread 0.21; a 2.5 % quantile of 40,000 draws is known to about 0.003.
    assert abs(ours.low - theirs.low) < 0.015 and abs(ours.high - theirs.high) < 0.015


def test_sides_of_an_unpaired_difference_are_resampled_independently():
    values = np.random.default_rng(0).normal(size=200)
    one = bootstrap_mean(values, num_resamples=4000)
    got = unpaired_difference(values, values, num_resamples=4000)
    # Variances add: sqrt(2) times one side's width. Equal draws on both sides would give a width of 0.
    assert (got.high - got.low) / (one.high - one.low) == pytest.approx(2**0.5, abs=0.12)
    assert got.value == 0 and got.p_value > 0.9


def test_pairing_narrows_the_interval_of_what_goes_up_and_down_together():
    rng = np.random.default_rng(0)
    before = rng.normal(size=300)
    after = before + rng.normal(0.1, 0.1, size=300)
    paired, unpaired = paired_difference(before, after), unpaired_difference(before, after)
    assert paired.value == pytest.approx(unpaired.value, abs=1e-12)
    assert 5 * (paired.high - paired.low) < unpaired.high - unpaired.low


def test_unpaired_difference_knows_strata_clusters_and_what_is_not_scored():
    before, after = np.array([0.0, 1, 1, 1, np.nan]), np.array([1.0, 1, 0])
    got = unpaired_difference(before, after, (list("abbbb"), list("aab")), ([0, 1, 1, 2, 2], [0, 1, 2]))
    assert got.value == pytest.approx((1.0 + 0.0) / 2 - (0.0 + 1.0) / 2)
    nothing = unpaired_difference(np.array([np.nan, 1.0]), np.ones(2), (["a", "b"], ["a", "b"]))
    assert np.isnan([nothing.value, nothing.low, nothing.high, nothing.p_value]).all()
    with pytest.raises(ValueError, match="0 values to average"):
        unpaired_difference(np.array([]), np.ones(2))


# What is refused


def test_what_does_not_pair_is_refused_unless_unpaired(tmp_path):
    whole = scored(value=coin(1), prompts=4, samples=2)
    other = scored(value=coin(2), prompts=4, samples=2)
    other.per_image[3]["prompt"] = "another prompt"
    fewer = scored(value=coin(3), prompts=4, samples=1)
    short = scored(value=coin(3), prompts=4, samples=2, tags=get_benchmark("shapes").columns[:5])
    for wrong, message in ((other, "'prompt 1' and b .* of 'another prompt' do not pair"), (fewer, "do not pair")):
        with pytest.raises(ValueError, match=message) as error:
            main_compare("stage compare", files(tmp_path, whole, wrong))
        assert "--unpaired" in str(error.value)
        text = main_compare("stage compare", [*files(tmp_path, whole, wrong), "--unpaired"])
        assert "UNPAIRED, each side resampled by itself" in text and "overall" in text
    with pytest.raises(ValueError, match="a has 48 images and b 40, so they do not pair"):
        main_compare("stage compare", files(tmp_path, whole, short))
    text = main_compare("stage compare", [*files(tmp_path, whole, short), "--unpaired"])
    assert "a and b do not both have a score of color_attr" in text and "\noverall" not in text
    assert "48 / 24" in main_compare("stage compare", [*files(tmp_path, whole, fewer), "--unpaired"])


def test_other_benchmarks_and_measures_are_refused(tmp_path):
    strict = scored(measures=["strict"])
    both = scored(measures=["strict", "graded"])
    graded = scored(measures=["graded"])
    with pytest.raises(ValueError, match="a is of 'shapes' and b of 'geneval'; compare scores of one benchmark"):
        main_compare("stage compare", files(tmp_path, strict, scored("geneval")))
    with pytest.raises(ValueError, match="a has no measure 'graded'; it has strict"):
        main_compare("stage compare", [*files(tmp_path, strict, both), "--measure", "graded"])
    with pytest.raises(ValueError, match="a has no measure 'hps'; it has strict"):
        main_compare("stage compare", [*files(tmp_path, both, both), "--measure", "hps"])
    with pytest.raises(ValueError, match="no measure is in all score files"):
        main_compare("stage compare", files(tmp_path, strict, graded))
    assert "graded is left out: a lacks it." in main_compare("stage compare", files(tmp_path, strict, both))
    assert "\ngraded " not in main_compare("stage compare", [*files(tmp_path, both, both), "--measure", "strict"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.with_suffix(".per_image.jsonl").unlink(), "b.json holds no scores"),
        (lambda path: tear(path.with_suffix(".per_image.jsonl")), "b.json holds no scores"),
        (lambda path: tear(path), "b.json holds no scores"),
        (lambda path: path.unlink(), "b.json holds no scores"),
        (lambda path: path.write_text("[]"), "b.json holds no scores"),
        (lambda path: path.write_bytes(b"\x89PNG\xff"), "b.json holds no scores"),
    ],
)
def test_files_that_are_missing_or_torn_are_refused(tmp_path, damage, message, capsys):
    paths = files(tmp_path, scored(), scored())
    damage(tmp_path / "b.json")
    with pytest.raises(SystemExit) as ended:
        main(["compare", *paths])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert message in err and len(err.splitlines()) == 1 and "stage evaluate" in err


def tear(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.json"], "there is 1 score file to compare"),
        (["a.json", "a.json"], "a.json is given twice"),
        (["a.json", "b.json", "--names", "one"], "must name each of the 2 files"),
        (["a.json", "b.json", "--names", "one,one"], "all differently"),
        (["a.json", "b.json", "--names", "one,"], "all differently"),
        (["a.json", "b.json", "--out", "x.pdf"], r"x\.pdf is no file of a known kind; let it end in \.md"),
        (["a.json", "b.json", "--out", "folder.html"], "no file of a known kind"),
        ([], "required: SCORES.json"),
    ],
)
def test_wrong_words_are_refused(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    files(tmp_path, scored(), scored())
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match=message):
        main_compare("stage compare", words)


# What stands under the tables


def test_settings_that_differ_are_listed():
    def generated(**changes):
        generation = {"seed": 0, "sampling": {"guidance_scale": 1.0, "top_k": None}, "checkpoint": "aa"} | changes
        return scored(settings={"seed": 0, "generation": generation})

    same, model = generated(), generated(checkpoint="bb")
    guided = generated(checkpoint="bb", sampling={"guidance_scale": 5.0, "top_k": None})
    assert SAME in to_text(compare_sides(sides(same, same)))
    text = to_text(compare_sides(sides(same, model)))
    assert MODEL_ONLY in text and DIFFERENT not in text
    for show in (to_text, to_markdown, to_html):
        shown = show(compare_sides(sides(same, guided)))
        assert DIFFERENT in shown and MODEL_ONLY not in shown
    assert setting_differences(sides(same, guided)) == {
        "generation.checkpoint": ("aa", "bb"),
        "generation.sampling.guidance_scale": ("1.0", "5.0"),
    }
    long = compare_sides(sides(generated(checkpoint="ab" * 32), generated(model="x" * 99)))
    assert "abababababab..." in to_text(long) and "x" * 60 + "..." in to_text(long)
    foreign = scored(settings={"seed": 0}, versions={"torch": "3"})
    assert setting_differences(sides(same, foreign))["versions.torch"] == ("2", "3")
    assert setting_differences(sides(same, foreign))["generation.seed"] == ("0", "not recorded")


def test_what_makes_a_score_less_than_it_looks_is_said():
    def value(tag, index, sample):
        return None if index == 0 else 0.5

    torn = scored(partial=True, problems=["00003/samples/00000.png: torn", "more"], value=value)
    text = to_text(compare_sides(sides(scored(), torn)))
    assert "B (PARTIAL) is scored in spite of 2 problems with its images: 00003/samples/00000.png: torn" in text
    settings = {**torn.settings, "num_problems": 57}  # of which the first few of every kind are listed
    text = to_text(compare_sides(sides(scored(), dataclasses.replace(torn, settings=settings))))
    assert "B (PARTIAL) is scored in spite of 57 problems with its images: 00003/samples/00000.png: torn" in text
    assert text.startswith("Shapes world: B (PARTIAL) against A") and "B (PARTIAL) - A [95 % interval]" in text
    assert "B (PARTIAL) has 1 images that strict could not score" in text
    assert "not corrected for the number of lines" in text and "training again with another seed" in text
    assert "does not record how its images were made" not in text
    foreign = scored(settings={"seed": 0, "generation": {}})
    assert "B does not record how its images were made" in to_text(compare_sides(sides(scored(), foreign)))
    # A column that one side has no score of is named, and no number of it is made up.
    blind = scored(value=lambda tag, index, sample: None if tag == "colors" else 0.5)
    (table,) = compare_sides(sides(scored(), blind)).tables
    assert not {line.name for line in table.lines} & {"colors", "overall", "heldout"}
    assert "A and B do not both have a score of colors" in to_text(compare_sides(sides(scored(), blind)))


def test_diversity_is_shown_where_both_sides_have_it_in_one_space():
    def spread(distance, space="codes"):
        return scored(diversity={"unique_share": 1.0, "pairwise_distance": distance, "space": space})

    text = to_text(compare_sides(sides(spread(0.43), spread(0.21))))
    assert "Mean distance of images of one prompt (codes, 1 - cosine): A 0.430, B 0.210." in text
    for other in (spread(0.21, "clip"), spread(None, None)):
        assert "Mean distance" not in to_text(compare_sides(sides(spread(0.43), other)))


# The outputs


def test_published_rows_stand_beside_ones_own(tmp_path):
    paths = files(tmp_path, scored("geneval", value=coin(1)), scored("geneval", value=coin(2)))
    words = [*paths, "--published", "--names", "before,after"]
    text = main_compare("stage compare", words)
    assert re.search(r"^before \(scored here\) +0\.\d{3} \[0\.\d{3}, 0\.\d{3}\] ", text, re.MULTILINE)
    assert re.search(r"^STAGE \(best\) +0\.89 +0\.99 +0\.95 +0\.82 +0\.90 +0\.89 +0\.79$", text, re.MULTILINE)
    assert re.search(r"^STAGE \(HPS\+GDino\+Git\) +0\.81 +- +- ", text, re.MULTILINE)
    assert "Source: arXiv:2509.25027, Tables 1-9" in text and "without an interval" in text
    assert re.search(r"^T2I-R1: its own inference writes a plan in words before every image", text, re.MULTILINE)
    assert "STAGE (best)" not in main_compare("stage compare", paths)
    for name in ("c.md", "c.html", "c.json"):
        assert main_compare("stage compare", [*words, "--out", str(tmp_path / name)]).endswith(f"{name}")
        content = (tmp_path / name).read_text()
        assert "2509.25027" in content and "STAGE (best)" in content
        assert content.count("its own inference writes a plan in words") >= 1
    shapes = [*files(tmp_path, scored(), scored()), "--published"]
    assert "There are no published results of Shapes world (strict)." in main_compare("stage compare", shapes)


def test_json_holds_the_numbers_unrounded(tmp_path):
    before, after = scored(value=coin(1), prompts=5), scored(value=coin(2), prompts=5)
    out = tmp_path / "new" / "comparison.json"
    main_compare("stage compare", [*files(tmp_path, before, after), "--out", str(out)])
    content = json.loads(out.read_text())
    (table,) = content["tables"]
    expected = compare(before, after, "strict")
    for line in table["lines"]:
        assert line["difference"] == dataclasses.asdict(expected[line["name"]])
        assert line["before"]["value"] == before.scores["strict"][line["name"]]
    assert len(table["lines"]) == 8 and content["paired"] is True and content["sides"] == ["a", "b"]
    assert [path.name for path in out.parent.iterdir()] == ["comparison.json"]


def test_markdown_tables_hold_together():
    comparison = compare_sides(sides(scored("geneval"), scored("geneval"), names=["x", EVIL]), with_published=True)
    text = to_markdown(comparison)
    assert "<script>" not in text and "\\|" in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 2
    for block in blocks:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block}
        assert len(cells) == 1, block
        assert re.fullmatch(r"\| ---( \| ---:?)+ \|", block[1])
    assert text.startswith("## GenEval: ") and text.endswith("\n")


class Page(HTMLParser):
    """Tags that do not close, and what a page would load or run."""

    def __init__(self, page):
        super().__init__()
        self.open, self.loads, self.tags = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_by_itself():
    before = scored("hps", value=lambda *place: 28 + coin(1)(*place), measures=["hps_v2.1", "image_reward"])
    after = scored("hps", value=lambda *place: 29 + coin(2)(*place), measures=["hps_v2.1", "image_reward"])
    comparison = compare_sides(sides(before, after, names=["_x", EVIL]), with_published=True)
    page = to_html(comparison)
    parsed = Page(page)
    assert not parsed.open and not parsed.loads and not {"script", "link", "iframe"} & set(parsed.tags)
    assert parsed.tags.count("svg") == 4  # scores and differences of two measures
    assert "&lt;script&gt;" in page and "2509.25027" in page and 'class="theirs"' in page
    overall = compare(before, after, "hps_v2.1")["overall"]
    assert f"{overall.value:+.3f}" in page and f"[{overall.low:+.3f}, {overall.high:+.3f}]" in page
    # Scores of 28 are not drawn on an axis from 0 to 1.
    chart = page[page.index("<svg") : page.index("</svg>")]
    assert re.search(r">2[89](\.\d+)?</text>", chart)
    # Differences of about 1 are drawn on an axis that shows 0.
    chart = page[page.index("<svg", page.index("</svg>")) :]
    assert re.search(r">0(\.0+)?</text>", chart[: chart.index("</svg>")])
    assert to_html(comparison) == page


def test_more_files_are_each_compared_with_the_first(tmp_path):
    paths = files(tmp_path, *(scored(value=coin(seed), measures=["strict", "graded"]) for seed in range(4)))
    comparison = compare_sides(
        [Side(name, Scores.load(path)) for name, path in zip("abcd", map(tmp_path.joinpath, paths))]
    )
    shown = [(table.measure, table.before.name, table.after.name) for table in comparison.tables]
    assert shown == [(measure, "a", other) for measure in ("strict", "graded") for other in "bcd"]
    assert json.loads(to_json(comparison))["sides"] == list("abcd")
    text = main_compare("stage compare", [*paths, "--names", "base,x,y,z"])
    assert text.startswith("Shapes world: x, y, z against base") and "z - base [95 % interval]" in text
    Page(to_html(comparison))


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = main_compare("stage compare", [*files(tmp_path, scored(), scored()), "--out", "~/comparison.md"])
    assert text.endswith(f"wrote {tmp_path / 'comparison.md'}") and (tmp_path / "comparison.md").exists()


def test_files_of_one_name_are_called_by_their_folders(tmp_path):
    for name in ("grpo", "stage"):
        scored().save(tmp_path / name / "scores.json")
    words = [str(tmp_path / name / "scores.json") for name in ("grpo", "stage")]
    assert main_compare("stage compare", words).startswith("Shapes world: stage against grpo, paired image by image")
    scored().save(tmp_path / "images.scores.json")
    assert "images against scores" in main_compare("stage compare", [words[0], str(tmp_path / "images.scores.json")])
