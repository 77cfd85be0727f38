"""Prompt files: every format, every way a file can be wrong, and the official files where they lie beside us."""

import json
from pathlib import Path

import pytest

from stage_grpo.data import load_rows, to_dataset
from stage_grpo.types import PromptRow

OFFICIAL = Path(__file__).parents[2] / "shared" / "data"
CAT = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_is_one_prompt_a_line(tmp_path):
    path = written(tmp_path, "p.txt", '\ufeffa cat\r\n\r\n  a "dog", sitting  \na\u2028b')
    assert load_rows(path) == [
        PromptRow("a cat", {}),
        PromptRow('a "dog", sitting', {}),
        PromptRow("a\u2028b", {}),
    ]


def test_jsonl_keeps_the_object_as_metadata(tmp_path):
    plain = {"prompt": "two dogs", "source": "mine"}
    path = written(tmp_path, "p.jsonl", f"{json.dumps(CAT)}\n\n{json.dumps(plain)}\n")
    assert load_rows(path) == [PromptRow("a photo of a cat", CAT), PromptRow("two dogs", plain)]


def test_rows_of_t2i_r1_are_checked_when_they_are_read(tmp_path):
    path = written(tmp_path, "p.jsonl", '{"prompt": "two dogs", "task_type": "counting"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1: .*'counting'"):
        load_rows(path)


@pytest.mark.parametrize("column", ["prompt", "Prompts"])
def test_csv_reads_the_prompt_column(tmp_path, column):
    content = f'Category,{column}\nColors,"A red car, and a ""blue"" one."\nText,"two\nlines"\n'
    assert load_rows(written(tmp_path, "p.csv", content)) == [
        PromptRow('A red car, and a "blue" one.', {"Category": "Colors"}),
        PromptRow("two\nlines", {"Category": "Text"}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.yaml", "a", r"p\.yaml: unknown kind of prompt file '\.yaml'; use \.txt, \.jsonl or \.csv"),
        ("p.txt", "", r"p\.txt: the file holds no prompt"),
        ("p.txt", " \n\n", r"p\.txt: the file holds no prompt"),
        ("p.jsonl", "\n", r"p\.jsonl: the file holds no prompt"),
        ("p.csv", "prompt\n", r"p\.csv: the file holds no prompt"),
        ("p.csv", "", r"p\.csv, line 1: no column 'prompt' or 'Prompts' among \[\]"),
        ("p.csv", "text,tag\na,b\n", r"p\.csv, line 1: no column .* among \['text', 'tag'\]"),
        ("p.csv", "prompt,tag\na,b\n,c\n", r"p\.csv, line 3: the prompt is ''; fill the column 'prompt'"),
        ("p.csv", "prompt\na cat, sitting\n", r"p\.csv, line 2: more values .*quotes"),
        ("p.csv", 'prompt\n"a cat\n', r"p\.csv, line 2: broken CSV .*quotes"),
        ("p.txt", b"a cat\na d\xf6g\n", r"p\.txt, line 2: not UTF-8 .*save the file as UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"p\.jsonl, line 2: broken JSON .*one JSON object a line"),
        ("p.jsonl", '["a cat"]\n', r"p\.jsonl, line 1: found \['a cat'\]"),
        ("p.jsonl", '{"text": "a cat"}\n', r"p\.jsonl, line 1: the prompt is None; fill \"prompt\""),
        ("p.jsonl", '{"prompt": ["a"]}\n', r"p\.jsonl, line 1: the prompt is \['a'\]"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"prompt": "a", "include": [{"class": "cat", "count": 0}]}\n',
            r"p\.jsonl, line 2: include\[0\] has count 0",
        ),
        ("p.jsonl", '{"prompt": "a", "include": []}\n', r"p\.jsonl, line 1: .*no 'include' clause"),
    ],
)
def test_errors_name_file_line_and_remedy(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_rows(written(tmp_path, name, content))


def test_unreadable_paths_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"none\.txt: cannot be read \(No such file"):
        load_rows(tmp_path / "none.txt")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"folder\.jsonl: cannot be read \(Is a directory"):
        load_rows(str(tmp_path / "folder.jsonl"))


def test_dataset_keeps_each_rows_own_keys():
    rows = [PromptRow("a photo of a cat", CAT), PromptRow("un chat à part", {}), PromptRow("x", {"n": [1]})]
    dataset = to_dataset(rows)
    assert dataset.column_names == ["prompt", "metadata"]
    assert [PromptRow(row["prompt"], json.loads(row["metadata"])) for row in dataset] == rows


def test_dataset_needs_rows():
    with pytest.raises(ValueError, match="at least one"):
        to_dataset([])


def test_files_in_the_official_formats(tmp_path):
    own = {
        "geneval/evaluation_metadata.jsonl": (json.dumps(CAT) + "\n", 1),
        "t2i_compbench/color_val.txt": ("a green bench and a blue bowl\r\na red orange\r\n", 2),
        "drawbench/drawbench.csv": ('"Prompts","Category"\n"A red colored car.","Colors"\n', 1),
        "ocr/test.txt": ('A runway displaying "Spring". Models walk.\n', 1),
    }
    for name, (content, num_rows) in own.items():
        assert len(load_rows(written(tmp_path, Path(name).name, content))) == num_rows
    official = {
        "geneval/evaluation_metadata.jsonl": 553,
        "drawbench/drawbench.csv": 200,
        "ocr/test.txt": 1018,
        "t2i_r1/train.jsonl": 7223,
    }
    for name in ("3d_spatial", "color", "complex", "non_spatial", "numeracy", "shape", "spatial", "texture"):
        official[f"t2i_compbench/{name}_val.txt"] = 300
    for name, num_rows in official.items():
        if (OFFICIAL / name).exists():
            assert len(load_rows(OFFICIAL / name)) == num_rows, name
