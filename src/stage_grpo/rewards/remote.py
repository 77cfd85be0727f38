"""A reward that another process computes, reached over HTTP: ``reward_options: {hps: {url: http://gpu2:8000}}``."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import httpx2 as httpx
import numpy as np
from PIL import Image

from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.rewards.batching import batches
from stage_grpo.rewards.connection import HEALTH_SECONDS, in_words, open_client
from stage_grpo.rewards.failures import REASON
from stage_grpo.rewards.protocol import ProtocolError, decode_response, encode_request
from stage_grpo.rewards.registry import REWARDS
from stage_grpo.types import Metadata

MAX_ANSWER_BYTES = 16_000_000
_TRANSIENT = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class RemoteOptions:
    """The connection to a reward server.

    Attributes:
        url: its address, e.g. ``http://127.0.0.1:8000``.
        token: what the server was started with, if anything. It ends up in the run folder with the rest of the
            configuration; ``token_file`` does not.
        token_file: a file that holds the token.
        timeout: seconds after which an answer is given up.
        retries: further tries after one that failed.
        first_wait: seconds before the first of them; doubled before each further one.
        batch_size: images of one request.

    Raises:
        ValueError: a value that cannot be.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    token_file: str | None = None
    timeout: float = 120.0
    retries: int = 3
    first_wait: float = 0.5
    batch_size: int = 64

    def __post_init__(self):
        _check_url(self.url)
        for name in ("token", "token_file"):
            if not isinstance(getattr(self, name), str | None):  # the value may be a secret
                raise ValueError(f"{name} must be text, not {type(getattr(self, name)).__name__}; put it into quotes")
        if self.token is not None and self.token_file is not None:
            raise ValueError("both token and token_file are given; give one")
        for name, least, kind in (
            ("timeout", 0.001, int | float),
            ("retries", 0, int),
            ("first_wait", 0, int | float),
            ("batch_size", 1, int),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < math.inf:
                raise ValueError(f"{name}={value!r} must be a number of at least {least}")

    def read_token(self) -> str | None:
        """The token, from its file if it is in one.

        Raises:
            ValueError: the file cannot be read.
        """
        if self.token_file is None:
            return self.token
        try:
            return Path(self.token_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"token_file={self.token_file!r} cannot be read ({error}); name a text file") from error


def _check_url(url: Any) -> None:
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise ValueError(f"url={url!r} is no address of a server; write http://HOST:PORT")


class RemoteReward(Reward):
    """Scores that a server computes, see ``stage serve-reward`` and :mod:`stage_grpo.rewards.protocol`.

    A server that cannot be reached, or answers what it should not, gives NaN with the reason for every image of the
    step, never a number; the run stops after some such steps in a row. Several remote rewards are asked at once.

    Args:
        name: How it is called in logs.
        options: The connection.
    """

    Options = RemoteOptions
    asynchronous: ClassVar[bool] = True

    def __init__(self, name: str, options: RemoteOptions):
        super().__init__(options)
        self.name = name
        token = options.read_token()
        self._headers: dict[bytes, bytes] = {b"Authorization": f"Bearer {token}".encode()} if token else {}

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> RewardResult:
        """Asks the server, a few images at a time. See :meth:`Reward.compute`."""
        scores = np.full(len(images), math.nan)
        details: dict[str, list[Any]] = {REASON: [None] * len(images)}
        with self._client() as client:
            for part in batches(len(images), self.options.batch_size):
                body = encode_request(images[part], prompts[part], metadata[part])
                try:
                    answer = self._ask(client, body, part.stop - part.start)
                except (httpx.HTTPError, ProtocolError) as error:
                    reason = f"{self.options.url}: {in_words(error)}"
                    details[REASON][part.start :] = [reason] * (len(images) - part.start)
                    break  # the next request would only wait as long again
                scores[part] = answer.scores
                for name, values in answer.details.items():
                    details.setdefault(name, [None] * len(images))[part] = values
        return RewardResult(scores, details)

    def check_health(self) -> str:
        """Asks the server whether it is there, and which reward it computes. See :meth:`Reward.check_health`.

        A name that is not in the table of rewards says nothing of what the server computes.

        Raises:
            ValueError: it is not there, or computes another reward.
        """
        start = f"start it there by: stage serve-reward {self.name}"
        with self._client(timeout=min(HEALTH_SECONDS, self.options.timeout)) as client:
            try:
                answer = client.get("health")
                _check_status(answer.status_code, answer.content)
                found = str(answer.json()["reward"])
            except (httpx.HTTPError, ProtocolError, ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"the server of reward {self.name!r} at {self.options.url} does not answer as one "
                    f"({in_words(error)}); {start}"
                ) from error
        if self.name in REWARDS and found != self.name:
            raise ValueError(
                f"the server of reward {self.name!r} at {self.options.url} computes {found!r:.60}; {start}, or give "
                "the url of another server"
            )
        return found

    def _client(self, timeout: float | None = None) -> httpx.Client:
        return open_client(self.options.url, self._headers, timeout or self.options.timeout)

    def _ask(self, client: httpx.Client, body: bytes, num_images: int) -> RewardResult:
        """Ask once and, if the line or the server falters, again."""
        for attempt in range(self.options.retries + 1):
            time.sleep(self.options.first_wait * 2 ** (attempt - 1) if attempt else 0)
            try:
                return self._ask_once(client, body, num_images)
            except (httpx.TransportError, ProtocolError) as error:
                again = isinstance(error, httpx.TransportError) or error.status in _TRANSIENT
                if not again or attempt == self.options.retries:
                    raise
        raise AssertionError("the last attempt either returns or raises")

    def _ask_once(self, client: httpx.Client, body: bytes, num_images: int) -> RewardResult:
        deadline = time.monotonic() + self.options.timeout
        with client.stream("POST", "score", content=body, headers={"Content-Type": "application/json"}) as answer:
            content = bytearray()
            for chunk in answer.iter_bytes():
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise ProtocolError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > deadline:  # httpx counts the seconds between two chunks
                    raise httpx.ReadTimeout(f"no whole answer in {self.options.timeout:g} s")
        _check_status(answer.status_code, bytes(content))
        return decode_response(bytes(content), num_images)


def _check_status(status: int, content: bytes) -> None:
    if status != 200:
        raise ProtocolError(f"HTTP {status} {content[:200].decode(errors='replace')}".strip(), status)


class DeqaReward(RemoteReward):
    """DeQA-Score, which needs transformers 4.36 and so an environment of its own: always over HTTP."""

    name = "deqa"

    def __init__(self, options: RemoteOptions):
        super().__init__("deqa", options)
