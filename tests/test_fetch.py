"""Fetching prompt files: against a server on this machine that cuts, refuses and lies; never the internet."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stage_grpo.data import load_rows
from stage_grpo.download import Patience, download, download_checked
from stage_grpo.prompt_sets import command
from stage_grpo.prompt_sets.fetch import cache_folder, fetch, locate, presence, sha256_of
from stage_grpo.prompt_sets.sources import PROMPT_SETS, PromptSet, RemoteFile

OFFICIAL = Path(__file__).parents[2] / "shared" / "data"
BODY = "".join(f"a photo of {i} cats\n" for i in range(20_000)).encode()
SHA = hashlib.sha256(BODY).hexdigest()
QUICK = Patience(attempts=3, first_wait=0.001, timeout=5)


class Server:
    """Answers request by request as told in ``plan``; the last word of the plan stays. Keeps the ranges asked for."""

    def __init__(self):
        self.plan, self.body, self.ranges, self.tag = ["serve"], BODY, [], None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.ranges.append(self.headers.get("Range"))
                outer.answer(self, outer.plan.pop(0) if len(outer.plan) > 1 else outer.plan[0])

            def log_message(self, format, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/prompts/p.txt"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, handler, word):
        if word.isdigit():
            handler.send_error(int(word))
            return
        asked = handler.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and word != "no ranges" else 0
        if start >= len(self.body):
            handler.send_error(416)
            return
        handler.send_response(206 if start else 200)
        shown = start + 1 if word == "other range" else start
        if start:
            handler.send_header("Content-Range", f"bytes {shown}-{len(self.body) - 1}/{len(self.body)}")
        if self.tag:
            handler.send_header("ETag", self.tag)
        handler.send_header("Content-Length", str(len(self.body) - start))
        handler.end_headers()
        rest = self.body[start:]
        handler.wfile.write(rest[: len(rest) // 2] if word == "cut" else rest)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def a_set(url, sha256=SHA, name="p.txt"):
    return PromptSet("mine", "My prompts", "MIT", "http://home", (RemoteFile(name, url, sha256),))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_once(server, tmp_path):
    (path,) = fetch(a_set(server.url), tmp_path, patience=QUICK)
    assert path == tmp_path / "p.txt" and path.read_bytes() == BODY
    assert fetch(a_set(server.url), tmp_path, patience=QUICK) == [path]
    assert server.ranges == [None] and names_in(tmp_path) == ["p.txt"]


def test_a_cut_connection_is_continued(server, tmp_path):
    server.plan = ["cut", "cut", "serve"]
    (path,) = fetch(a_set(server.url), tmp_path, patience=QUICK)
    half = len(BODY) // 2
    assert path.read_bytes() == BODY
    assert server.ranges == [None, f"bytes={half}-", f"bytes={half + (len(BODY) - half) // 2}-"]


def test_a_later_call_continues_where_the_last_gave_up(server, tmp_path):
    server.plan = ["cut", "503"]
    with pytest.raises(
        OSError, match=r"cannot download http://127\S+ \(HTTP 503 .*\); get it elsewhere and put it at"
    ):
        fetch(a_set(server.url), tmp_path, patience=QUICK)
    assert names_in(tmp_path) == [f".p.txt.{SHA[:12]}.part"]
    server.plan = ["serve"]
    (path,) = fetch(a_set(server.url), tmp_path, patience=QUICK)
    assert path.read_bytes() == BODY and server.ranges[-1] == f"bytes={len(BODY) // 2}-"
    assert names_in(tmp_path) == ["p.txt"]


@pytest.mark.parametrize(
    ("tags", "ranges"),
    [
        (('"a"', '"a"'), [f"bytes={len(BODY) // 2}-"]),
        (('"a"', '"b"'), [f"bytes={len(BODY) // 2}-", None]),
        (('"a"', None), [f"bytes={len(BODY) // 2}-", None]),
        ((None, '"a"'), [None]),
        (('W/"a"', 'W/"a"'), [None]),
    ],
)
def test_without_a_checksum_only_the_same_version_is_continued(tags, ranges, server, tmp_path):
    part = tmp_path / "part"
    server.plan, server.tag = ["cut", "503"], tags[0]
    with pytest.raises(OSError, match="HTTP 503"):
        download_checked(server.url, part, "p", "", "by hand", QUICK)
    server.plan, server.tag, server.ranges = ["serve"], tags[1], []
    server.body = BODY if tags[0] == tags[1] else BODY.upper()
    download_checked(server.url, part, "p", "", "by hand", QUICK)
    assert part.read_bytes() == server.body and server.ranges == ranges and names_in(tmp_path) == ["part"]


@pytest.mark.parametrize("word", ["no ranges", "other range"])
def test_a_server_that_cannot_continue_sends_all_again(word, server, tmp_path):
    server.plan = ["cut", word, "serve"]
    (path,) = fetch(a_set(server.url), tmp_path, patience=QUICK)
    assert path.read_bytes() == BODY


def test_a_part_that_is_whole_is_not_fetched_again(server, tmp_path):
    (tmp_path / f".p.txt.{SHA[:12]}.part").write_bytes(BODY)
    (path,) = fetch(a_set(server.url), tmp_path, patience=QUICK)
    assert path.read_bytes() == BODY and server.ranges == []


@pytest.mark.parametrize("left", [b"not the beginning", BODY + b"and more"])
def test_a_bad_part_is_thrown_away(left, server, tmp_path):
    (tmp_path / f".p.txt.{SHA[:12]}.part").write_bytes(left)
    (path,) = fetch(a_set(server.url), tmp_path, patience=QUICK)
    assert path.read_bytes() == BODY
    assert server.ranges == [f"bytes={len(left)}-", None]


def test_a_wrong_checksum_is_refused_with_both_named(server, tmp_path):
    server.body = b"<html>please log in</html>"
    found = hashlib.sha256(server.body).hexdigest()
    with pytest.raises(ValueError, match=rf"is not the official file: its SHA-256 is {found}, not {SHA}; get it els"):
        fetch(a_set(server.url), tmp_path, patience=QUICK)
    assert names_in(tmp_path) == []


def test_a_missing_page_is_not_asked_for_twice(server, tmp_path):
    server.plan = ["404"]
    target = tmp_path / "p.txt"
    with pytest.raises(OSError, match=rf"{server.url} \(HTTP 404 Not Found\); .* put it at {target}, .*--from PATH$"):
        fetch(a_set(server.url), tmp_path, patience=QUICK)
    assert server.ranges == [None] and names_in(tmp_path) == []


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.plan = ["503", "429", "serve"]
    (path,) = fetch(a_set(server.url), tmp_path, patience=QUICK)
    assert path.read_bytes() == BODY and len(server.ranges) == 3


def test_waits_double(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("stage_grpo.download.time.sleep", waits.append)
    server.plan = ["503"]
    with pytest.raises(OSError, match="HTTP 503"):
        download(server.url, tmp_path / "part", "p.txt", Patience(attempts=5, first_wait=1.0))
    assert [wait for wait in waits if wait] == [1, 2, 4, 8]


def test_no_network_is_one_clear_line(server, tmp_path):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(OSError) as raised:
        fetch(a_set(server.url), tmp_path, patience=QUICK)
    message = str(raised.value)
    assert server.url in message and "Connection refused" in message and "\n" not in message
    assert str(tmp_path / "p.txt") in message and "--from PATH" in message


def test_from_a_file_or_folder(tmp_path):
    nowhere = "http://127.0.0.1:9/prompts/official_name.json"
    source = tmp_path / "usb"
    source.mkdir()
    for name, given in [("whatever.bin", source / "whatever.bin"), ("official_name.json", source), ("p.txt", source)]:
        (source / name).write_bytes(BODY)
        (path,) = fetch(a_set(nowhere), tmp_path / name, given)
        assert path.read_bytes() == BODY and names_in(path.parent) == ["p.txt"]
        (source / name).unlink()
    with pytest.raises(ValueError, match=rf"--from {source} holds no p\.txt or official_name\.json; get it from http"):
        fetch(a_set(nowhere), tmp_path / "none", source)


def test_from_a_wrong_file_is_refused(tmp_path):
    wrong = tmp_path / "wrong.txt"
    wrong.write_bytes(b"something else")
    found = sha256_of(wrong)
    with pytest.raises(ValueError, match=rf"{wrong} is not the official file: its SHA-256 is {found}, not {SHA}"):
        fetch(a_set("http://127.0.0.1:9/p.txt"), tmp_path / "out", wrong)
    assert names_in(tmp_path / "out") == []


def test_an_altered_file_is_never_overwritten(server, tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"edited by hand")
    with pytest.raises(ValueError, match=rf"{path} is not the official file: .* not {SHA}; remove it to fetch it"):
        fetch(a_set(server.url), tmp_path, patience=QUICK)
    assert path.read_bytes() == b"edited by hand" and server.ranges == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"cannot make the folder .*file/sub \(Not a directory\); choose another by --out"
    ):
        fetch(a_set("http://127.0.0.1:9/p.txt"), tmp_path / "file" / "sub")


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("STAGE_DATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "stage-grpo" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "stage-grpo" / "data"
    monkeypatch.setenv("STAGE_DATA", "~/prompts")
    assert cache_folder() == tmp_path / "prompts"


@pytest.fixture
def small_sets(server, tmp_path, monkeypatch):
    """Two sets on the local server, in the table's place, with an empty cache."""
    server.body = b'{"prompt": "a cat"}\n'
    sha256 = hashlib.sha256(server.body).hexdigest()
    two = tuple(RemoteFile(name, server.url, sha256) for name in ("a.jsonl", "b.jsonl"))
    sets = {"one": a_set(server.url, sha256, "p.jsonl"), "two": PromptSet("two", "Two files", "MIT", "http://h", two)}
    monkeypatch.setattr(command, "PROMPT_SETS", sets)
    for name, prompt_set in sets.items():
        monkeypatch.setitem(PROMPT_SETS, name, prompt_set)
    monkeypatch.setenv("STAGE_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_commands_fetch_and_list(small_sets):
    assert command.main_fetch("stage data fetch", ["two"]) == "\n".join(
        f"ready {small_sets / 'two' / name}" for name in ("a.jsonl", "b.jsonl")
    )
    assert [load_rows(path)[0].prompt for path in locate("two")] == ["a cat", "a cat"]
    folder, head, one, two = command.main_list("stage data list", []).split("\n")
    assert folder == f"folder: {small_sets} (STAGE_DATA chooses another)"
    assert head.split() == ["name", "state", "licence", "source", "holds"]
    assert one.split()[:4] == ["mine", "missing", "MIT", "http://home"]
    assert two.split()[:4] == ["two", "present", "MIT", "http://h"]


def test_a_file_without_a_known_checksum_is_pinned_by_its_first_fetch(server, tmp_path, monkeypatch):
    server.body = b'["a cat", "a dog"]'
    mine = a_set(server.url, None, "anime.json")
    assert presence(mine, tmp_path) == "missing"
    (path,) = fetch(mine, tmp_path, patience=QUICK)
    assert path.read_bytes() == server.body and presence(mine, tmp_path) == "present"
    assert (tmp_path / "anime.json.sha256").read_text().strip() == hashlib.sha256(server.body).hexdigest()
    # The bytes of the first fetch are those of every later one: an edit shows, and so does another file at home.
    path.write_bytes(b'["a cow"]')
    assert presence(mine, tmp_path) == "altered"
    with pytest.raises(ValueError, match=r"anime\.json is not the official file: .*; remove it to fetch it again"):
        fetch(mine, tmp_path, patience=QUICK)
    path.unlink()
    server.body = b'["a cow"]'
    with pytest.raises(ValueError, match="is not the official file"):
        fetch(mine, tmp_path, patience=QUICK)
    # One that was put there by hand counts once a fetch has looked at it.
    (tmp_path / "hand").mkdir()
    (tmp_path / "hand" / "anime.json").write_text('["a pig"]')
    assert presence(mine, tmp_path / "hand") == "incomplete"
    fetch(mine, tmp_path / "hand", patience=QUICK)
    assert presence(mine, tmp_path / "hand") == "present"
    server.body = b"<html>please log in</html>"
    with pytest.raises(ValueError, match=r"what came for anime\.json is no JSON list of prompts; get it from http"):
        fetch(mine, tmp_path / "page", patience=QUICK)
    assert names_in(tmp_path / "page") == [] and presence(mine, tmp_path / "page") == "missing"
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror/")
    assert (
        PROMPT_SETS["hps"].files[0].address == "http://mirror/datasets/zhwang/HPDv2/resolve/main/benchmark/anime.json"
    )


def test_presence_and_locate(small_sets):
    command.main_fetch("stage data fetch", ["two"])
    (small_sets / "two" / "b.jsonl").unlink()
    assert presence(PROMPT_SETS["two"]) == "incomplete"
    (small_sets / "two" / "a.jsonl").write_text("edited")
    assert presence(PROMPT_SETS["two"]) == "altered"
    with pytest.raises(ValueError, match=r"'two' is altered in .*two; get it by: stage data fetch two$"):
        locate("two")
    with pytest.raises(ValueError, match=r"'one' is missing in .*; get it by: stage data fetch one --out there$"):
        locate("one", Path("there"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: name"),
        (["geneva"], "unknown prompt set 'geneva'; known are geneval, t2i_compbench, drawbench, hps, ocr, t2i_r1"),
        (["geneval", "--from", "nowhere"], "--from nowhere does not exist"),
        (["t2i_compbench", "--from", __file__], "is one file; give the folder that holds color_val.txt, shape_val"),
        (["geneval", "--form", "x"], "unrecognized arguments: --form x"),
    ],
)
def test_wrong_commands(words, message, tmp_path, monkeypatch):
    monkeypatch.setenv("STAGE_DATA", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message):
        command.main_fetch("stage data fetch", words)


def test_the_table_is_pinned():
    files = [file for prompt_set in PROMPT_SETS.values() for file in prompt_set.files]
    unknown = [file for file in files if file.sha256 is None]
    assert unknown == list(PROMPT_SETS["hps"].files)  # whose checksums could not be established
    files = [file for file in files if file.sha256 is not None]
    assert len(files) == 12 and len({file.sha256 for file in files}) == 12
    for file in files:
        assert len(file.sha256) == 64 and set(file.sha256) <= set("0123456789abcdef")
        assert file.url.startswith("https://")
        # At GitHub a commit, never a branch: 40 hexadecimal digits after owner and repository.
        if "githubusercontent" in file.url:
            commit = file.url.split("/")[5]
            assert len(commit) == 40 and set(commit) <= set("0123456789abcdef")


SIZES = {"geneval": [553], "t2i_compbench": [300] * 8, "drawbench": [200], "ocr": [1018], "t2i_r1": [7223]}


def test_official_files_are_the_pinned_ones_and_load(tmp_path):
    """On the official files where they lie beside the repository; elsewhere there is nothing to compare."""
    there = [prompt_set for name, prompt_set in PROMPT_SETS.items() if name in SIZES and (OFFICIAL / name).is_dir()]
    for prompt_set in there:
        paths = fetch(prompt_set, tmp_path / prompt_set.name, OFFICIAL)
        assert [len(load_rows(path)) for path in paths] == SIZES[prompt_set.name]
