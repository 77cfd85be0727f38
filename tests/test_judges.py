"""Judges: what is asked, what is read from the answers, in process and behind an OpenAI-compatible server."""

import asyncio
import base64
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

from stage_grpo.rewards.judges import REALISM, JudgeOptions, UnifiedReward, VlmJudge
from stage_grpo.rewards.qwen_vl import QwenVl
from stage_grpo.rewards.registry import build_reward
from test_remote_rewards import free_port, start  # noqa: F401  (start is a fixture)

IMAGES = [Image.new("RGB", (70, 56), (0, 0, 60 * i)) for i in range(4)]
PROMPTS = ["a cat", "a dog", 'a {prompt} " \\', "an owl"]


class Chat:
    """An OpenAI-compatible server that gives the answers of ``plan`` by prompt; keeps the requests."""

    def __init__(self, plan, key=None):
        self.plan, self.key, self.requests, self.authorized = plan, key, [], []
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
                Route("/v1/models", lambda request: JSONResponse({"data": [{"id": "qwen"}, {"id": "other"}]})),
            ]
        )

    async def complete(self, request):
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "no key"}, 401)
        content = await request.json()
        self.requests.append(content)
        text = content["messages"][0]["content"][1]["text"]
        answer = next(answer for word, answer in self.plan.items() if word in text)
        if isinstance(answer, list):  # one after the other
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if isinstance(answer, int):
            return JSONResponse({"error": "busy"}, answer)
        if isinstance(answer, dict):
            return JSONResponse(answer)
        await asyncio.sleep(0)
        return JSONResponse({"choices": [{"message": {"content": answer}}]})


def judge(url, name="vlm_judge", **options):
    given = {"question": "Judge: {prompt}", "server": f"{url}/v1", "model": "qwen", "retries": 1, "timeout": 5.0}
    return build_reward(name, {**given, **options})


def test_answers_become_shares_of_the_highest_score(start):  # noqa: F811
    chat = Chat(
        {"cat": '{"score": 4}', "dog": 'First {"score": 1}. No: {"score": 2.5}', "prompt": '"score": "0"', "": "no"}
    )
    result = judge(start(chat.app)).score(IMAGES, PROMPTS)
    np.testing.assert_allclose(result.scores, [0.8, 0.5, 0.0, math.nan], atol=1e-9)
    assert result.details["reason"] == [None, None, None, "no score in the answer 'no'"]
    assert result.details["answer"][0] == '{"score": 4}'
    sent = {request["messages"][0]["content"][1]["text"]: request for request in chat.requests}
    assert set(sent) == {f"Judge: {prompt}" for prompt in PROMPTS}
    request = sent["Judge: a dog"]
    assert (request["model"], request["temperature"]) == ("qwen", 0)
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.asarray(image), np.asarray(IMAGES[1]))


@pytest.mark.parametrize("answer", ['{"score": 6}', '{"score": -1}', '{"score": "good"}', "4", "", '{"score": NaN}'])
def test_an_answer_without_a_score_in_its_range_is_no_score(answer):
    score, reason = VlmJudge()._read(answer)
    assert math.isnan(score) and reason


@pytest.mark.parametrize(
    ("answer", "score"),
    [("Final Score: 4", 0.8), ("cat (object): 1\nFinal Score: **3.5**", 0.7), ("Final Score: 0.5", None), ("3", None)],
)
def test_unified_reward_reads_its_final_score(answer, score):
    found, reason = UnifiedReward()._read(answer)
    assert (found, reason) == (score, None) if score else math.isnan(found)


def test_unified_reward_sends_its_own_size_and_question(start):  # noqa: F811
    chat = Chat({"a cat": "Final Score: 5"})
    reward = build_reward("unified_reward", {"server": start(chat.app) + "/v1", "model": "u"})
    assert reward.score(IMAGES[:1], PROMPTS[:1]).scores.tolist() == [1.0]
    content = chat.requests[0]["messages"][0]["content"]
    image = Image.open(io.BytesIO(base64.b64decode(content[0]["image_url"]["url"].partition(",")[2])))
    assert image.size == (512, 512) and "[a cat]" in content[1]["text"] and chat.requests[0]["max_tokens"] == 512


def test_a_faltering_server_is_asked_again_and_a_refusing_one_is_not(start, tmp_path):  # noqa: F811
    chat = Chat({"cat": [503, '{"score": 5}'], "dog": 400, "owl": {"choices": []}, "prompt": 500}, key="k")
    (tmp_path / "key").write_text("k\n")
    url = start(chat.app)
    result = judge(url, key_file=str(tmp_path / "key")).score(IMAGES, PROMPTS)
    np.testing.assert_array_equal(result.scores, [1.0, math.nan, math.nan, math.nan])
    asked = [request["messages"][0]["content"][1]["text"] for request in chat.requests]
    assert asked.count("Judge: a dog") == 1 and asked.count("Judge: a cat") == 2
    assert "400" in result.details["reason"][1] and "did not answer" in result.details["reason"][3]
    refused = judge(url).score(IMAGES[:1], PROMPTS[:1])
    assert "401" in refused.details["reason"][0]
    gone = judge(f"http://127.0.0.1:{free_port()}").score(IMAGES[:1], PROMPTS[:1])
    assert "ConnectError" in gone.details["reason"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server": "localhost:8000"}, "server='localhost:8000' is no address"),
        ({"server": "http://host/v1"}, "server is given without model"),
        ({"question": " "}, "question=' ' is empty"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"timeout": 0.0}, "timeout=0.0"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_reward("vlm_judge", options)


def test_counts_are_whole_numbers():
    """Fields of a wrong type are refused without the tests' own type checker, too."""
    for name, value in (("max_tokens", 64.5), ("retries", 1.9), ("concurrency", 2.0), ("key_file", 5)):
        options = JudgeOptions()
        object.__setattr__(options, name, value)
        with pytest.raises(ValueError, match=f"{name}={value} (must be a whole number|is no text)"):
            options.__post_init__()


def test_a_proxy_does_not_stand_between_a_run_and_its_own_machine(start, monkeypatch):  # noqa: F811
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    reward = judge(start(Chat({"cat": '{"score": 4}'}).app), retries=0)
    assert reward.check_health() == "vlm_judge"
    assert reward.score(IMAGES[:1], PROMPTS[:1]).scores.tolist() == [0.8]


def test_a_server_is_asked_for_its_models_before_work(start):  # noqa: F811
    url = start(Chat({}).app)
    with pytest.raises(ValueError, match=r"/v1' has no model='qwem'; give one of qwen, other"):
        judge(url, model="qwem").check_health()
    with pytest.raises(ValueError, match=r"does not list its models \(HTTP 404\); start it, or write http://HOST"):
        judge(url, server=url).check_health()
    with pytest.raises(ValueError, match=r"does not list its models \(cannot be reached .*start it"):
        judge(f"http://127.0.0.1:{free_port()}").check_health()


def test_a_server_brings_its_own_weights():
    assert build_reward("vlm_judge").needed_weights() == ("qwen2.5-vl-7b",)
    assert build_reward("vlm_judge", {"server": "http://host/v1", "model": "m"}).needed_weights() == ()
    assert "score" in REALISM


# ---- in process -----------------------------------------------------------------------------------------------------

SPECIAL = [
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen2.5-VL with random weights, and a byte tokenizer with its special tokens."""
    folder = tmp_path_factory.mktemp("qwen")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:2] + SPECIAL[3:]})
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": len(tokenizer), "pad_token_id": ids["<|pad|>"],
        "eos_token_id": ids["<|im_end|>"], "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "fullatt_block_indexes": [1], "window_size": 112},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    return folder


def test_answers_in_process_do_not_depend_on_the_batch_and_see_the_image(folder):
    noise = np.random.default_rng(0).integers(0, 256, (4, 56, 70, 3), dtype=np.uint8)
    images = [Image.fromarray(picture) for picture in noise]
    images[2] = images[2].resize((112, 84))  # another number of places
    questions = ["short", "a longer question", "x", "x"]
    alone = QwenVl(folder, "cpu", "float32", 1).answer(images, questions, 8)
    together = QwenVl(folder, "cpu", "float32", 4).answer(images, questions, 8)
    assert alone == together and len(set(alone)) == 4 and all(len(str(answer)) > 0 for answer in alone)


def test_a_judge_in_process_is_loaded_once_and_its_babble_is_no_score(folder):
    reward = build_reward("vlm_judge", {"weights": str(folder), "dtype": "float32", "batch_size": 2, "max_tokens": 4})
    result = reward.score(IMAGES[:3], PROMPTS[:3])
    assert np.isnan(result.scores).all() and all("no score in the answer" in r for r in result.details["reason"])
    chat = reward._chat
    state = torch.random.get_rng_state()
    again = reward.score(IMAGES[:3], PROMPTS[:3])
    assert reward._chat is chat and torch.equal(state, torch.random.get_rng_state())
    assert json.dumps(again.details) == json.dumps(result.details)
    assert not any(parameter.requires_grad for parameter in chat._model.parameters())


def test_the_batch_follows_what_the_model_leaves_free(folder, monkeypatch):
    model = QwenVl(folder, "cpu", "float32", None)
    asked = []
    monkeypatch.setattr("stage_grpo.rewards.qwen_vl.choose_batch_size", lambda *given: asked.append(given) or 2)
    assert len(model.answer(IMAGES[:1], ["x"], 1)) == 1
    assert asked == [(None, 400_000_000, "cpu")]


def test_the_published_names_of_weights_are_read(folder):
    """Those of the index of Qwen2.5-VL 7B; this version of transformers calls its modules otherwise."""
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        names = {re.sub(r"\d+", "N", name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
    assert {"model.layers.N.self_attn.q_proj.bias", "visual.blocks.N.mlp.gate_proj.bias", "lm_head.weight"} <= names
    assert {name.split(".")[0] for name in names} == {"model", "visual", "lm_head"}
    assert not any(name.startswith("model.language_model") for name in names)
    QwenVl(folder, "cpu", "float32", 1)  # refuses a folder that lacks a weight
