"use strict";
// Hand-worked cases of the gallery's pure functions: node gallery_rules.js TEMPLATES/gallery_rules.js.j2
const assert = require("node:assert/strict");
const { Module } = require("node:module");
const fs = require("node:fs");

const loaded = new Module("gallery_rules");
loaded._compile(fs.readFileSync(process.argv[2], "utf8"), "gallery_rules.js");
const rules = loaded.exports;

const row = (prompt, tag, ...cells) => ({ index: 0, sample: 0, prompt, tag, cells: cells.map((scores) => scores && { scores }) });
// Measures: strict, graded. First set, then last.
const data = {
  sets: [{ name: "before" }, { name: "after" }],
  measures: ["strict", "graded"],
  verdict: 0,
  tags: ["colors", "counting"],
  rows: [
    row("a red dog", "colors", [0, 0.25], [1, 1]), // gained
    row("two cats", "counting", [1, 1], [0, 0.5]), // lost
    row("a blue cat", "colors", [1, 1], [1, 1]),
    row("three dogs", "counting", [0, 0.5], [0, 0.75]), // better, yet as wrong as before
    row("four dogs", "counting", [null, null], [0, 0]), // first one not scored
    row("a red cat", "colors", null, [1, 0.9]), // first one not there
  ],
};
const select = (change) => rules.selectRows(data, { ...rules.DEFAULTS, ...change });

const cases = {
  filters() {
    assert.deepEqual(select({}), [0, 1, 2, 3, 4, 5]);
    assert.deepEqual(select({ filter: "correct" }), [0, 2, 5]);
    assert.deepEqual(select({ filter: "wrong" }), [1, 3, 4]);
    assert.deepEqual(select({ filter: "unscored" }), [4, 5]);
    assert.deepEqual(select({ filter: "gained" }), [0]);
    assert.deepEqual(select({ filter: "lost" }), [1]);
    // By the rule of right and wrong, whichever measure is shown.
    assert.deepEqual(select({ filter: "changed", measure: 1 }), [0, 1]);
    assert.deepEqual(select({ tag: "counting", filter: "wrong" }), [1, 3, 4]);
    assert.deepEqual(select({ q: "DOG three" }), [3]);
    assert.deepEqual(select({ q: "  " }), [0, 1, 2, 3, 4, 5]);
    assert.deepEqual(select({ q: "(.*" }), []);
  },
  "without a rule, changes are of the measure shown"() {
    const judged = { ...data, verdict: null };
    const find = (filter, measure) => rules.selectRows(judged, { ...rules.DEFAULTS, filter, measure });
    assert.deepEqual(find("gained", 1), [0, 3]);
    assert.deepEqual(find("gained", 0), [0]);
    assert.deepEqual(find("correct", 0), []);
  },
  "sorting puts what has no number last and keeps the order of ties"() {
    assert.deepEqual(select({ sort: "high", measure: 1 }), [0, 2, 5, 3, 1, 4]);
    assert.deepEqual(select({ sort: "low", measure: 1 }), [4, 1, 3, 5, 0, 2]);
    assert.deepEqual(select({ sort: "gain", measure: 1 }), [0, 3, 2, 1, 4, 5]); // +.75 +.25 0 -.5
    assert.deepEqual(select({ sort: "loss", measure: 1 }), [1, 2, 3, 0, 4, 5]);
    assert.deepEqual(data.rows.map((one) => rules.differenceOf(one, 0)), [1, -1, 0, 0, null, null]);
    assert.equal(rules.differenceOf(row("x", null, [1]), 0), null);
  },
  "counts are those of the filters"() {
    for (const tag of ["", "colors"]) {
      const counts = rules.countVerdicts(data, { ...rules.DEFAULTS, tag });
      for (const [filter, count] of Object.entries(counts)) assert.equal(select({ tag, filter }).length, count, filter);
    }
  },
  verdicts() {
    const of = (score, verdict = 0) => rules.verdictOf(score && { scores: score }, verdict);
    assert.deepEqual([of([1]), of([0]), of([0.5]), of([null]), of(null), of([1], null)],
      ["correct", "wrong", "wrong", "unscored", null, null]);
    assert.equal(rules.verdictOf({}, 0), "unscored");
  },
  "the address holds the state, and nothing else gets in"() {
    const state = { q: "a & b #1 <script>", tag: "colors", filter: "gained", sort: "low", measure: 1, boxes: false, row: 3, view: true };
    const there = (hash) => rules.parseState(hash, data.measures, data.tags);
    assert.deepEqual(there("#" + rules.formatState(state, data.measures)), state);
    assert.equal(rules.formatState(rules.DEFAULTS, data.measures), "");
    assert.deepEqual(there(""), rules.DEFAULTS);
    assert.deepEqual(there("#filter=right&sort=constructor&tag=x&measure=y&row=-1&view=1&boxes=2"), rules.DEFAULTS);
    assert.deepEqual(there("#filter=wrong"), { ...rules.DEFAULTS, filter: "wrong" });
  },
  "cards fill a line, and one that is too wide stands alone"() {
    // Three tiles of 100, two gaps of 6, a frame of 18: 330; two of them and a gap of 12 are 672.
    assert.equal(rules.layoutOf(671, 3, 100, 300, 12, 80).perLine, 1);
    const two = rules.layoutOf(672, 3, 100, 300, 12, 80);
    assert.deepEqual(two, { tile: 100, card: 330, perLine: 2, lineHeight: 192 });
    // One a line at 671: (671 - 18 - 12) / 3 = 213.67.
    assert.deepEqual(rules.layoutOf(671, 3, 100, 300, 12, 80), { tile: 213, card: 669, perLine: 1, lineHeight: 305 });
    assert.equal(rules.layoutOf(671, 3, 100, 150, 12, 80).tile, 150);
    assert.deepEqual(rules.layoutOf(90, 3, 100, 300, 12, 80), { tile: 100, card: 330, perLine: 1, lineHeight: 192 });
  },
  "only lines near the window are drawn"() {
    assert.deepEqual(rules.visibleLines(0, 450, 100, 1000, 2), { first: 0, end: 7 });
    assert.deepEqual(rules.visibleLines(5050, 450, 100, 1000, 2), { first: 48, end: 57 });
    assert.deepEqual(rules.visibleLines(99900, 450, 100, 1000, 2), { first: 997, end: 1000 });
    assert.deepEqual(rules.visibleLines(5050, 450, 100, 3, 2), { first: 3, end: 3 });
    assert.deepEqual(rules.visibleLines(0, 450, 100, 0, 2), { first: 0, end: 0 });
  },
  "keys stay within the cards"() {
    const from = (place, ...keys) => keys.map((key) => rules.move(key, place, 10, 3, 6));
    assert.deepEqual(from(4, "ArrowRight", "j", "ArrowLeft", "k", "ArrowDown", "ArrowUp"), [5, 5, 3, 3, 7, 1]);
    assert.deepEqual(from(4, "PageDown", "PageUp", "Home", "End", "x", "toString"), [9, 0, 0, 9, null, null]);
    assert.deepEqual(from(9, "j", "ArrowDown"), [9, 9]);
    assert.deepEqual(from(-1, "j", "ArrowUp", "End"), [0, 0, 9]);
    assert.equal(rules.move("j", 0, 0, 3, 6), null);
  },
  "boxes keep their class's colour in every image of a row"() {
    const cells = [{ boxes: [["ring", "red", 1, 2, 4, 8, 0.914]] }, { boxes: [["dog", null, 5, 5, 4, 9, 0.5], ["ring", null, 0, 0, 1, 1, 1]] }, null];
    const classes = rules.classesOf({ cells });
    assert.deepEqual(classes, ["dog", "ring"]);
    const [[first], [dog, second], [none]] = cells.map((cell) => rules.boxesOf(cell, classes));
    assert.deepEqual([first.x, first.y, first.width, first.height, first.label], [1, 2, 3, 6, "red ring 0.91"]);
    assert.equal(first.stroke, second.stroke);
    assert.notEqual(first.stroke, dog.stroke);
    assert.deepEqual([dog.width, dog.label, none], [0, "dog 0.50", undefined]);
    assert.deepEqual(rules.boxesOf({}, classes), []);
  },
  numbers() {
    assert.deepEqual([null, 0, 0.12345, 27.456, 123.456].map(rules.formatScore), ["–", "0.000", "0.123", "27.46", "123.5"]);
    assert.deepEqual([null, -0.5, 0.25].map(rules.formatDifference), ["", "−0.500", "+0.250"]);
  },
  "a card says what it shows"() {
    assert.equal(rules.describe(data.rows[4], data, 1),
      "four dogs, image 1. before: unscored graded –. after: wrong graded 0.000");
    assert.equal(rules.describe(data.rows[5], data, 0), "a red cat, image 1. before: no image. after: correct strict 1.000");
  },
};

for (const [name, check] of Object.entries(cases)) {
  try {
    check();
    process.stdout.write(`passed ${name}\n`);
  } catch (error) {
    process.stdout.write(`FAILED ${name}: ${error.message}\n`);
    process.exitCode = 1;
  }
}
