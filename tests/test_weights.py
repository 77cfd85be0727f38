"""Getting weights: downloaded or copied, checked, converted once, whole or not there."""

import hashlib
import http.server
import json
import threading

import pytest

from stage_grpo import weights
from stage_grpo.cli import main
from stage_grpo.download import Patience
from stage_grpo.rewards.registry import build_reward, lacking
from stage_grpo.weights.catalog import WEIGHTS, WeightEntry, WeightFile

CONTENT = {
    "model.pth": b"torch" * 50_000,
    "config.json": b'{"model_type": "clip"}',
    "m.safetensors.index.json": json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}).encode(),
    "m-1.safetensors": b"one",
    "m-2.safetensors": b"two",
}
SHA = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
QUICK = Patience(attempts=2, first_wait=0.001, timeout=5)
CALLS = []


def convert(source_files, out):
    CALLS.append(sorted(source_files))
    (out / "model.safetensors").write_bytes(source_files["model.pth"].read_bytes()[::-1])


def convert_badly(source_files, out):
    (out / "half").write_bytes(b"x")
    raise ValueError("decoder.weight has shape (3,), not (4,)")


@pytest.fixture
def home(monkeypatch):
    """A server of the files above; ``home.asked`` keeps paths and ranges."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            asked.append((self.path, self.headers.get("Range")))
            if name not in CONTENT:
                self.send_error(404)
                return
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            body = CONTENT[name][start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(CONTENT[name]) - 1}/{len(CONTENT[name])}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    server.asked, server.url = asked, f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGE_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture
def table(home, monkeypatch):
    """Weights of the server above, in the table."""

    def file(name, sha256=None):
        return WeightFile(name, url=f"{home.url}/files/{name}", sha256=sha256 or SHA[name])

    here = f"{__name__}:"
    entries = {
        "converted": WeightEntry((file("model.pth", SHA["model.pth"][:8]),), here + "convert", "MIT", "http://home"),
        "ready": WeightEntry((file("config.json"), file("model.pth")), None, "MIT", "http://home"),
        "broken": WeightEntry((file("model.pth"),), here + "convert_badly", "MIT", "http://home"),
        "wrong": WeightEntry((file("model.pth", "0" * 64),), here + "convert", "MIT", "http://home"),
        "sharded": WeightEntry((file("m.safetensors.index.json"),), None, "MIT", "http://home"),
        "hub": WeightEntry((WeightFile("config.json", hub="a/b"),), None, "MIT", "http://home"),
    }
    for name, entry in entries.items():
        monkeypatch.setitem(WEIGHTS, name, entry)
    CALLS.clear()
    return entries


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_weights_are_fetched_checked_and_converted_once(table, home, cache):
    assert not weights.is_present("converted")
    folder = weights.get("converted", patience=QUICK)
    assert folder == cache / "converted" == weights.folder("converted")
    assert (folder / "model.safetensors").read_bytes() == CONTENT["model.pth"][::-1]
    assert names_in(folder) == ["manifest.json", "model.safetensors", "source.json"]
    source = json.loads((folder / "source.json").read_text())
    assert source["files"]["model.pth"] == {
        "address": f"{home.url}/files/model.pth",
        "sha256": SHA["model.pth"],
        "checked": True,
    }
    assert weights.get("converted") == folder and CALLS == [["model.pth"]] and len(home.asked) == 1
    assert names_in(cache) == ["converted"] and list((cache / ".sources").iterdir()) == []


def test_files_in_transformers_layout_are_taken_as_they_are(table, cache):
    folder = weights.get("ready", patience=QUICK)
    assert (folder / "model.pth").read_bytes() == CONTENT["model.pth"]
    assert (folder / "config.json").read_bytes() == CONTENT["config.json"]


def test_an_index_brings_its_shards(table, home, cache):
    folder = weights.get("sharded", patience=QUICK)
    assert (folder / "m-1.safetensors").read_bytes() == b"one"
    assert (folder / "m-2.safetensors").read_bytes() == b"two"
    files = json.loads((folder / "source.json").read_text())["files"]
    assert files["m-1.safetensors"] == {"address": None, "sha256": SHA["m-1.safetensors"], "checked": False}


def test_an_index_leads_nowhere_else(table, cache, monkeypatch):
    monkeypatch.setitem(CONTENT, "evil.index.json", b'{"weight_map": {"a": "../../outside.safetensors"}}')
    evil = WeightFile("evil.index.json", url=table["ready"].files[0].url.replace("config.json", "evil.index.json"))
    monkeypatch.setitem(WEIGHTS, "evil", WeightEntry((evil,), None, "MIT", "http://home"))
    with pytest.raises(ValueError, match=r"outside.safetensors', which is no file name"):
        weights.get("evil", patience=QUICK)
    assert not (cache / "evil").exists()


def test_an_interrupted_download_is_continued(table, home, cache):
    part = cache / ".sources" / "converted" / f".model.pth.{SHA['model.pth'][:8]}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT["model.pth"][:1000])
    weights.get("converted", patience=QUICK)
    assert home.asked == [("/files/model.pth", "bytes=1000-")]


def test_another_checksum_is_refused_and_nothing_kept(table, cache):
    with pytest.raises(ValueError, match=f"its SHA-256 is {SHA['model.pth']}, not {'0' * 64}; get it elsewhere"):
        weights.get("wrong", patience=QUICK)
    assert not weights.is_present("wrong") and CALLS == []


def test_a_failed_conversion_leaves_no_folder_and_keeps_the_download(table, home, cache):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"decoder.weight"):
            weights.get("broken", patience=QUICK)
    assert names_in(cache) == [] and list((cache / ".partial").iterdir()) == []
    assert len(home.asked) == 1


def test_files_are_taken_from_a_folder_or_a_renamed_file(table, home, cache, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "model.pth").write_bytes(CONTENT["model.pth"])
    weights.get("ready", mine, QUICK)
    assert home.asked == [("/files/config.json", None)]  # what the folder lacks is fetched
    renamed = tmp_path / "mask2former.pth"
    renamed.write_bytes(CONTENT["model.pth"])
    weights.get("converted", renamed)
    assert len(home.asked) == 1 and weights.is_present("converted") and renamed.is_file()
    renamed.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"mask2former.pth is not the official file"):
        weights.get("converted", renamed)
    assert weights.is_present("converted")
    with pytest.raises(ValueError, match="absent does not exist"):
        weights.get("converted", tmp_path / "absent")


def test_missing_and_damaged_weights_say_how_to_get_them(table, cache):
    with pytest.raises(
        weights.MissingWeightsError, match=r"'converted' are not in .*: stage weights get converted .*--from"
    ):
        weights.folder("converted")
    folder = weights.get("converted", patience=QUICK)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(weights.MissingWeightsError, match=r"not whole: it is torn: model.safetensors has 4 of 250000"):
        weights.folder("converted")
    weights.get("converted", patience=QUICK)
    assert weights.is_present("converted")
    with pytest.raises(ValueError, match="unknown weights 'hsp'; known are"):
        weights.folder("hsp")


def test_nothing_is_downloaded_from_the_hub_offline(table, cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"a/b/resolve/main/config.json is not downloaded, because HF_HUB_OFFLINE .*--from"
    ):
        weights.get("hub")


def test_hub_files_come_from_the_chosen_endpoint(table, home, cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    with pytest.raises(ValueError, match=r"HF_ENDPOINT='hf-mirror\.com' is no address; write https://HOST"):
        weights.get("hub", patience=QUICK)
    monkeypatch.setenv("HF_ENDPOINT", home.url)
    folder = weights.get("hub", patience=QUICK)
    assert home.asked == [("/a/b/resolve/main/config.json", None)]
    assert (folder / "config.json").read_bytes() == CONTENT["config.json"]


def test_files_without_a_checksum_are_taken_only_where_they_are_named_after_the_weights(
    table, home, cache, tmp_path, monkeypatch, capsys
):
    """Most models have a config.json, and nothing in it tells whose it is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", home.url)
    mine = tmp_path / "mine"
    (mine / "hub").mkdir(parents=True)
    (mine / "config.json").write_text("of another model")
    folder = weights.get("hub", mine, QUICK)
    assert (folder / "config.json").read_bytes() == CONTENT["config.json"]
    (mine / "hub" / "config.json").write_text("its own")
    for source in (mine, mine / "hub"):
        main(["weights", "get", "hub", "--from", str(source)])
        assert (folder / "config.json").read_text() == "its own" and len(home.asked) == 1
    assert "  config.json: no official SHA-256 is known; what came has " in capsys.readouterr().out


def test_commands(table, cache, capsys):
    main(["weights", "get", "converted", "sharded"])
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [f"ready {cache / 'converted'}", f"ready {cache / 'sharded'}"]
    assert out[2] == f"  m-1.safetensors: no official SHA-256 is known; what came has {SHA['m-1.safetensors']}"
    main(["weights", "list"])
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]}
    assert rows["converted"] == "present" and rows["ready"] == "missing"
    with pytest.raises(SystemExit):
        main(["weights", "get", "converted", "redy"])
    assert "unknown weights 'redy'" in capsys.readouterr().err


def test_every_entry_of_the_table_is_complete():
    for name, entry in WEIGHTS.items():
        assert entry.files and entry.licence and entry.home.startswith("https://"), name
        assert all(file.address.startswith("https://") for file in entry.files), name
        assert len({file.name for file in entry.files}) == len(entry.files), name
        for file in entry.files:
            assert file.sha256 is None or set(file.sha256) <= set("0123456789abcdef"), file
    # mmdet puts the first eight digits of the SHA-256 into the file's name.
    (mmdet,) = WEIGHTS["mask2former-swin-s-coco"].files
    assert mmdet.url.endswith(f"-{mmdet.sha256[:8]}.pth")


def test_a_reward_without_its_weights_is_built_but_lacks_them(cache):
    assert build_reward("hps").needed_weights() == ("hps-v2.1",)
    assert lacking("hps") == [(f"the weights hps-v2.1 of reward hps are not in {cache}", "stage weights get hps-v2.1")]
    assert lacking("hps", {"weights": str(cache.parent)}) == []
    ((what, remedy),) = lacking("hps", {"weights": "hps-v2"})
    assert what == "reward 'hps': weights='hps-v2' is neither a folder nor the name of weights"
    assert remedy.startswith("give a folder in transformers' layout, or a name of `stage weights list`")
    assert lacking("hsp") == [("unknown reward 'hsp'", lacking("hsp")[0][1])]
