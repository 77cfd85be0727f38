"""Rewards over HTTP: a real server and client on this machine, and everything that may arrive at either end."""

import base64
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2 as httpx
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from stage_grpo import graceful_stop
from stage_grpo.rewards import remote, server, worker
from stage_grpo.rewards.base import Reward, RewardResult, as_reward, as_trl_reward
from stage_grpo.rewards.protocol import Limits, ProtocolError, decode_request, decode_response, encode_request
from stage_grpo.rewards.registry import build_reward, lacking

IMAGES = [Image.fromarray(np.full((5, 7, 3), grey, np.uint8)) for grey in range(6)]
PROMPTS = [f"prompt {i}" for i in range(6)]
METADATA = [{"tag": "colors", "n": i} for i in range(6)]
SMALL = Limits(max_images=8, max_bytes=50_000, max_pixels=10_000, max_prompt=100)


class Grey(Reward):
    """Grey level / 10; no score for grey 3. Remembers what it saw."""

    name = "grey"

    def __init__(self):
        super().__init__()
        self.seen = []

    def compute(self, images, prompts, metadata):
        self.seen.append((prompts, metadata))
        greys = [image.getpixel((image.width - 1, image.height - 1)) for image in images]
        assert all(red == green == blue for red, green, blue in greys)
        scores = [np.nan if grey[0] == 3 else grey[0] / 10 for grey in greys]
        reasons = ["three is no grey" if grey[0] == 3 else None for grey in greys]
        return RewardResult(np.array(scores), {"reason": reasons, "size": [image.size for image in images]})


class Running:
    """A web application on a free port of this machine, in a thread."""

    def __init__(self, app):
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def stop(self):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)
        self.socket.close()


@pytest.fixture
def start():
    running = []

    def run(app):
        running.append(Running(app))
        return running[-1].url

    yield run
    for one in running:
        one.stop()


def client_of(url, **options):
    return build_reward("grey", {"url": url, "first_wait": 0.001, "retries": 1, "timeout": 5.0, **options})


def answering(content, status=200, after=0.0, chunk=None):
    """An application that always gives the same answer."""

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": status, "headers": []})
        import asyncio

        await asyncio.sleep(after)
        for _ in range(chunk or 0):
            await asyncio.sleep(0.02)
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
        await send({"type": "http.response.body", "body": content})

    async def with_lifespan(scope, receive, send):
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await app(scope, receive, send)

    return with_lifespan


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- both ends together ---------------------------------------------------------------------------------------------


def test_a_remote_reward_equals_the_local_one(start):
    local = Grey()
    reward = client_of(start(server.make_app(local)), batch_size=4)
    result = reward.score(IMAGES, PROMPTS, METADATA)
    np.testing.assert_array_equal(result.scores, [0.0, 0.1, 0.2, np.nan, 0.4, 0.5])
    assert result.details["reason"] == [None, None, None, "three is no grey", None, None]
    assert result.details["size"] == [[7, 5]] * 6
    # Six images in requests of at most four, each with its own prompts and metadata.
    assert local.seen == [(PROMPTS[:4], METADATA[:4]), (PROMPTS[4:], METADATA[4:])]
    assert reward.check_health() == "grey"


def test_several_clients_are_served_one_after_the_other(start):
    busy, most = [], []

    def slow(images, prompts, metadata):
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.01)
        busy.pop()
        return [float(prompt) for prompt in prompts]

    url = start(server.make_app(as_reward(slow)))
    results = {}

    def ask(number):
        results[number] = client_of(url).score(IMAGES[:2], [str(number), str(number + 0.5)]).scores.tolist()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == {number: [number, number + 0.5] for number in range(6)}
    assert max(most) == 1


def test_the_token_is_asked_for_and_brought(start, tmp_path):
    url = start(server.make_app(Grey(), token="secret"))
    (tmp_path / "token").write_text("secret\n")
    assert client_of(url, token="secret").score(IMAGES[:1], ["a"]).scores.tolist() == [0.0]
    assert client_of(url, token_file=str(tmp_path / "token")).check_health() == "grey"
    for options in ({}, {"token": "Secret"}, {"token": "secret2"}):
        result = client_of(url, **options).score(IMAGES[:1], ["a"])
        assert np.isnan(result.scores[0]) and "HTTP 401" in result.details["reason"][0]
        with pytest.raises(ValueError, match=r"does not answer as one \(HTTP 401 .*stage serve-reward grey"):
            client_of(url, **options).check_health()
    assert "secret" not in repr(client_of(url, token="secret").options)


def test_trl_awaits_a_remote_reward(start):
    import asyncio

    function = as_trl_reward(client_of(start(server.make_app(Grey()))))
    assert asyncio.iscoroutinefunction(function) and function.__name__ == "grey"
    columns = {}
    scores = asyncio.run(
        function(prompts=PROMPTS, generated_images=IMAGES, metadata=METADATA, log_extra=columns.__setitem__)
    )
    assert scores == [0.0, 0.1, 0.2, None, 0.4, 0.5]
    assert columns["grey/reason"][3] == "three is no grey"


def test_a_reward_that_raises_costs_its_request_alone(start):
    def picky(images, prompts, metadata):
        if "bad" in prompts:
            raise RuntimeError("no such thing")
        return [1.0] * len(images)

    reward = client_of(start(server.make_app(as_reward(picky))))
    refused = reward.score(IMAGES[:2], ["bad", "good"])
    assert np.isnan(refused.scores).all() and "RuntimeError: no such thing" in refused.details["reason"][1]
    assert reward.score(IMAGES[:2], ["good", "good"]).scores.tolist() == [1.0, 1.0]


def test_a_server_of_another_reward_is_refused(start):
    url = start(server.make_app(Grey()))
    ((what, remedy),) = lacking("hps", {"url": url})
    assert what == f"the server of reward 'hps' at {url} computes 'grey'"
    assert remedy.startswith("start it there by: stage serve-reward hps")
    assert lacking("mine", {"url": url}) == []  # a name that says nothing


def test_nothing_is_computed_for_clients_that_have_left(start):
    computed, go_on = [], threading.Event()

    def slow(images, prompts, metadata):
        computed.extend(prompts)
        assert go_on.wait(20)
        return [1.0] * len(images)

    url = start(server.make_app(as_reward(slow)))
    first = threading.Thread(target=lambda: client_of(url).score(IMAGES[:1], ["first"]))
    first.start()
    while not computed:
        time.sleep(0.005)
    assert np.isnan(client_of(url, timeout=0.1, retries=0).score(IMAGES[:1], ["gone"]).scores).all()
    go_on.set()
    first.join(20)
    assert client_of(url).score(IMAGES[:1], ["last"]).scores.tolist() == [1.0]
    assert computed == ["first", "last"]


def test_only_the_body_of_a_request_can_come_too_late(start, monkeypatch):
    def late(images, prompts, metadata):
        raise TimeoutError("the model took too long")

    monkeypatch.setattr(server, "BODY_SECONDS", 0.05)
    url = start(server.make_app(as_reward(late)))
    answer = httpx.post(f"{url}/score", json=REQUEST, trust_env=False)
    assert answer.status_code == 422 and "TimeoutError: the model took too long" in answer.json()["error"]
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as line:
        line.sendall(b"POST /score HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in line.recv(100)


# ---- the client -----------------------------------------------------------------------------------------------------


def test_an_unreachable_server_gives_no_score_and_a_counted_warning(caplog):
    reward = client_of(f"http://127.0.0.1:{free_port()}")
    result = reward.score(IMAGES, PROMPTS)
    assert np.isnan(result.scores).all()
    assert all("cannot be reached" in reason for reason in result.details["reason"])
    assert "reward 'grey' could not score 6 of 6 images: http://127.0.0.1" in caplog.text
    ((what, remedy),) = lacking("grey", {"url": reward.options.url, "timeout": 1.0})
    assert "does not answer" in what and remedy == "start it there by: stage serve-reward grey"


def test_a_dead_server_is_asked_once_a_step_and_not_once_a_batch(monkeypatch):
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    reward = client_of(f"http://127.0.0.1:{free_port()}", batch_size=1, retries=3, first_wait=0.5)
    assert np.isnan(reward.score(IMAGES, PROMPTS).scores).all()
    assert waits == [0, 0.5, 1.0, 2.0]


def test_a_server_that_comes_back_is_used_again(start):
    answers = iter([503, 200])
    real = server.make_app(Grey())

    async def app(scope, receive, send):
        if scope["type"] == "http" and next(answers) == 503:
            await answering(b"busy", 503)(scope, receive, send)
        else:
            await real(scope, receive, send)

    assert client_of(start(app)).score(IMAGES[:2], PROMPTS[:2]).scores.tolist() == [0.0, 0.1]


GOOD = {"protocol": 1, "scores": [0.5, None], "reasons": [None, "why"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no JSON"),
        (b"<html>Bad gateway</html>", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[1, 2]", "no JSON object"),
        (b"[" * 100_000, "no JSON"),
        (b'{"scores": [1, 2]}', "'protocol' is None"),
        (json.dumps({**GOOD, "protocol": 2}), "'protocol' is 2"),
        (json.dumps({**GOOD, "scores": [1.0]}), "is 1 scores"),
        (json.dumps({**GOOD, "scores": [1.0, 2.0, 3.0]}), "is 3 scores"),
        (json.dumps({**GOOD, "scores": 1.0}), "is 1.0"),
        (json.dumps({**GOOD, "scores": ["1.0", 2.0]}), "holds '1.0'"),
        (json.dumps({**GOOD, "scores": [True, 2.0]}), "holds True"),
        (json.dumps({**GOOD, "scores": [[1.0], 2.0]}), r"holds \[1.0\]"),
        (b'{"protocol": 1, "scores": [NaN, 1]}', "NaN is no JSON"),
        (b'{"protocol": 1, "scores": [Infinity, 1]}', "Infinity is no JSON"),
        (b'{"protocol": 1, "scores": [1e999, 1]}', "holds inf"),
        (b'{"protocol": 1, "scores": [' + b"9" * 400 + b", 1]}", "a number of 400 digits is too large"),
        (json.dumps({**GOOD, "reasons": ["x"]}), "'reason' must be a list of 2"),
        (json.dumps({**GOOD, "details": {"n": 3}}), "'n' must be a list of 2"),
        (json.dumps({**GOOD, "details": [1, 2]}), "'details' must be an object"),
    ],
)
def test_garbage_is_no_score(content, message, start):
    content = content if isinstance(content, bytes) else content.encode()
    with pytest.raises(ProtocolError, match=message):
        decode_response(content, 2)
    result = client_of(start(answering(content))).score(IMAGES[:2], PROMPTS[:2])
    assert np.isnan(result.scores).all() and len(result.details["reason"][0]) < 400


def test_a_good_answer_is_read():
    result = decode_response(json.dumps({**GOOD, "details": {"n": [1, "x"]}}).encode(), 2)
    np.testing.assert_array_equal(result.scores, [0.5, np.nan])
    assert result.details == {"n": [1, "x"], "reason": [None, "why"]}


@pytest.mark.parametrize(
    "answer", [answering(b"{}", after=5.0), answering(b"{}", chunk=200)], ids=["silent", "dripping"]
)
def test_a_slow_server_is_given_up(answer, start):
    begun = time.monotonic()
    result = client_of(start(answer), timeout=0.1, retries=1).score(IMAGES[:2], PROMPTS[:2])
    assert np.isnan(result.scores).all() and "no answer in time" in result.details["reason"][0]
    assert time.monotonic() - begun < 2


def test_an_endless_answer_is_cut(start, monkeypatch):
    monkeypatch.setattr(remote, "MAX_ANSWER_BYTES", 1000)
    result = client_of(start(answering(b" " * 2000))).score(IMAGES[:1], ["a"])
    assert "longer than 1000 bytes" in result.details["reason"][0]


@pytest.mark.parametrize("status", [301, 400, 404, 413, 422])
def test_refusals_are_not_repeated(status, start):
    asked = []

    async def app(scope, receive, send):
        asked.append(scope["type"])
        await answering(b"refused", status)(scope, receive, send)

    result = client_of(start(app), retries=5).score(IMAGES[:1], ["a"])
    assert f"HTTP {status} refused" in result.details["reason"][0] and asked.count("http") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "file:///etc/passwd"}, "is no address of a server"),
        ({"url": "localhost:8000"}, "is no address of a server"),
        ({"url": "http://user:pass@host"}, "is no address of a server"),
        ({"url": 8000}, "rejects its options"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": "long"}, "rejects its options"),
        ({"retries": -1}, "retries=-1"),
        ({"retries": 1.5}, "rejects its options"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"token": "a", "token_file": "b"}, "both token and token_file"),
        ({"token_file": "absent"}, "token_file='absent' cannot be read"),
        ({"strict": True}, "has no option 'strict'"),
    ],
)
def test_wrong_connections_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_reward("grey", {"url": "http://host:1", **options})


def test_a_token_file_that_is_no_text_is_refused():
    options = remote.RemoteOptions("http://host:1")
    object.__setattr__(options, "token_file", 5)  # what only the tests' own type checker would refuse otherwise
    with pytest.raises(ValueError, match="token_file must be text, not int; put it into quotes"):
        options.__post_init__()


def test_deqa_is_always_remote():
    assert build_reward("deqa", {"url": "http://host:1"}).name == "deqa"
    with pytest.raises(ValueError, match=r"'deqa' .*url"):
        build_reward("deqa")


# ---- the server -----------------------------------------------------------------------------------------------------


def png(width=4, height=4):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def gif():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "GIF")
    return base64.b64encode(buffer.getvalue()).decode()


REQUEST = {"protocol": 1, "images": [png(), png()], "prompts": ["a", "b"], "metadata": [{}, {}]}


@pytest.fixture(scope="module")
def service():
    with TestClient(server.make_app(Grey(), limits=SMALL), raise_server_exceptions=True) as client:
        yield client


def test_a_right_request_is_scored(service):
    answer = service.post("/score", json=REQUEST)
    assert answer.status_code == 200
    assert answer.json() == {
        "protocol": 1,
        "reward": "grey",
        "scores": [0.0, 0.0],
        "reasons": [None, None],
        "details": {"size": [[4, 4], [4, 4]]},
    }
    health = service.get("/health").json()
    assert (health["status"], health["reward"], health["max_images"]) == ("ok", "grey", 8)


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"protocol": None}, 400, "'protocol' is None"),
        ({"images": None}, 400, "'images' must be a list"),
        ({"images": []}, 400, "'images' must be a list"),
        ({"images": [1, 2]}, 400, "'images' must be a list"),
        ({"images": ["%%%", png()]}, 400, "image 0 is no PNG"),
        ({"images": [png(), "aGVsbG8="]}, 400, "image 1 is no PNG"),
        ({"images": [png(), gif()]}, 400, "image 1 is no PNG"),
        ({"images": [png(), png()[:60]]}, 400, "image 1 is no PNG"),
        ({"images": [png(), png(200, 100)]}, 413, "image 1 has 20000 pixels, more than 10000"),
        ({"images": [png()] * 9, "prompts": ["a"] * 9, "metadata": [{}] * 9}, 413, "9 images are more than 8"),
        ({"prompts": ["a"]}, 400, "2 images, 1 prompts and 2 metadata"),
        ({"prompts": ["a", 3]}, 400, "'prompts' must be a list of strings"),
        ({"prompts": ["a", "b" * 101]}, 413, "more than 100 characters"),
        ({"metadata": [{}, "x"]}, 400, "'metadata' must be a list of objects"),
        ({"metadata": {"a": 1}}, 400, "'metadata' must be a list of objects"),
    ],
)
def test_a_wrong_request_is_refused(change, status, message, service):
    answer = service.post("/score", json={**REQUEST, **change})
    assert answer.status_code == status and message in answer.json()["error"]


def test_oversized_requests_are_refused_whatever_they_say(service):
    assert service.post("/score", content=b"x" * 50_001).status_code == 413
    chunks = (b"x" * 1000 for _ in range(60))  # no length in the header
    assert service.post("/score", content=chunks).status_code == 413
    assert service.post("/score", content=b"{}", headers={"Content-Length": "99999999"}).status_code == 413


def test_a_png_bomb_is_seen_in_its_header():
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    import zlib

    bomb = header + zlib.crc32(header[12:]).to_bytes(4, "big") + b"\x00\x00\x00\x00IDAT"
    request = json.dumps({**REQUEST, "images": [base64.b64encode(bomb).decode(), png()]}).encode()
    with pytest.raises(ProtocolError):
        decode_request(request, Limits())


def test_no_token_no_service():
    with TestClient(server.make_app(Grey(), token="tökén")) as client:
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic abc"}, {"Authorization": ""}):
            assert client.get("/health", headers=headers).status_code == 401
            assert client.post("/score", json=REQUEST, headers=headers).status_code == 401
        assert client.get("/health", headers={"Authorization": "Bearer tökén".encode()}).status_code == 200


def test_other_paths_and_methods_are_not_there(service):
    assert [service.get(path).status_code for path in ("/", "/score", "/../etc/passwd", "/docs")] == [
        404,
        405,
        404,
        404,
    ]
    assert service.post("/health").status_code == 405


def test_too_many_waiting_clients_are_sent_away(monkeypatch):
    monkeypatch.setattr(server, "MAX_WAITING", 0)
    with TestClient(server.make_app(Grey())) as client:
        assert client.post("/score", json=REQUEST).status_code == 503


def test_fuzzed_requests_never_break_the_service(service):
    rng = random.Random(0)
    good = json.dumps(REQUEST).encode()
    odd = [
        None,
        True,
        -1,
        1e308,
        "",
        "x" * 200,
        [],
        {},
        [None],
        {"a": [1]},
        "\x00",
        "\ud800",
        [[]] * 5,
        {"__class__": "os"},
    ]
    statuses = []
    for _ in range(400):
        if rng.random() < 0.5:  # bytes changed, cut or added
            body = bytearray(good)
            for _ in range(rng.randint(1, 20)):
                body[rng.randrange(len(body))] = rng.randrange(256)
            content = bytes(body[: rng.randrange(len(body))] if rng.random() < 0.3 else body)
        else:  # values exchanged
            keys = rng.sample(sorted(REQUEST), rng.randint(1, 4))
            content = json.dumps({**REQUEST, **{key: rng.choice(odd) for key in keys}}).encode()
        statuses.append(service.post("/score", content=content).status_code)
    assert set(statuses) <= {200, 400, 413}
    assert service.post("/score", json=REQUEST).status_code == 200


def test_the_wire_carries_pixels_exactly():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)) for _ in range(3)]
    decoded, prompts, metadata = decode_request(
        encode_request(images, ["ä", "b", "\n"], [{"a": None}, {}, {"x": [1.5]}]), Limits()
    )
    for sent, got in zip(images, decoded):
        np.testing.assert_array_equal(np.asarray(sent), np.asarray(got))
    assert (prompts, metadata) == (["ä", "b", "\n"], [{"a": None}, {}, {"x": [1.5]}])


def test_the_client_speaks_plain_http(start):
    """Anyone can write a client: what docs/rewards.md states is all there is."""
    url = start(server.make_app(Grey()))
    answer = httpx.post(f"{url}/score", json=REQUEST, trust_env=False)
    assert answer.json()["scores"] == [0.0, 0.0]


def test_the_documented_deqa_server_speaks_the_protocol(monkeypatch):
    """Its environment has another transformers; here a stand-in scores."""
    text = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(block.splitlines()) < 40
    port = free_port()

    class Model:
        @classmethod
        def from_pretrained(cls, name, **options):
            assert (name, options["trust_remote_code"]) == ("zhiyuanyou/DeQA-Score-Mix3", True)
            return cls()

        def score(self, images):
            return torch.tensor([1.0 + image.getpixel((0, 0))[0] for image in images], dtype=torch.float16)

    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoModelForCausalLM=Model))
    running = {}
    monkeypatch.setattr("http.server.HTTPServer.serve_forever", lambda self: running.update(server=self))
    exec(compile(block.replace("8001", str(port)), "rewards.md", "exec"), {})
    monkeypatch.undo()
    monkeypatch.setattr("http.server.BaseHTTPRequestHandler.log_message", lambda *_: None)
    thread = threading.Thread(target=running["server"].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    reward = build_reward("deqa", {"url": f"http://127.0.0.1:{port}", "batch_size": 4})
    assert reward.check_health() == "deqa"
    assert reward.score(IMAGES, PROMPTS, METADATA).scores.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    running["server"].shutdown()
    running["server"].server_close()


# ---- a process of its own -------------------------------------------------------------------------------------------


def test_a_worker_scores_in_another_process_and_is_started_again_when_it_dies():
    reward = build_reward("worker_rewards:grey_or_die", {"worker": True, "scale": 2.0})
    here = [str(os.getpid())] * 6
    assert reward.name == "grey_or_die" and reward.asynchronous
    assert reward.score(IMAGES, here).scores.tolist() == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    died = reward.score(IMAGES[:2], ["die", "die"])
    assert np.isnan(died.scores).all() and "the worker process died" in died.details["reason"][0]
    assert reward.score(IMAGES[:2], here[:2]).scores.tolist() == [0.0, 0.2]
    # What ends a run after its step does not cost the step its scores, and no error ends the worker.
    assert set(worker.SIGNALS) == set(graceful_stop.SIGNALS)
    assert reward.score(IMAGES[:2], [here[0], "signals"]).scores.tolist() == [0.0, 0.2]
    for prompt, message in [("exit", r"SystemExit\(3\)"), ("odd", "TwoFoldError.*this and that")]:
        with pytest.raises(RuntimeError, match=message):
            reward.score(IMAGES[:1], [prompt])
    assert reward.score(IMAGES[:2], here[:2]).scores.tolist() == [0.0, 0.2]
    reward._pool.shutdown()


def test_a_worker_ends_with_its_run_however_that_ends():
    program = (
        "import time; from PIL import Image; from stage_grpo.rewards.registry import build_reward\n"
        "build_reward('worker_rewards:grey_or_die', {'worker': True}).score([Image.new('RGB', (1, 1))], ['0'])\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    run.kill()
    assert run.communicate(timeout=30) == ("", None)  # the worker had the same standard output


def test_a_worker_is_refused_what_its_reward_is_refused():
    with pytest.raises(ValueError, match="worker='yes' is no truth value"):
        build_reward("shapes", {"worker": "yes"})
    with pytest.raises(ValueError, match="'shapes' has no option 'strikt'"):
        build_reward("shapes", {"worker": True, "strikt": True})
    assert build_reward("shapes", {"worker": False}).name == "shapes"
