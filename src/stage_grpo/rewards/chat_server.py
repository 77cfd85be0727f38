"""A vision-language model behind any OpenAI-compatible server (vLLM, SGLang, ...): one question about one image."""

from __future__ import annotations

import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
from PIL import Image

from stage_grpo.rewards.connection import HEALTH_SECONDS, in_words, open_client


class ChatServer:
    """Asks a server's ``/chat/completions``, several questions at once.

    Args:
        server: Base address, e.g. ``http://127.0.0.1:8000/v1``.
        model: Name under which it serves the model.
        key_file: File with the key that it asks for, if any.
        timeout: Seconds after which an answer is given up.
        retries: Further tries after one that failed.
        concurrency: Questions under way at a time.

    Raises:
        ValueError: The key file cannot be read.
    """

    def __init__(self, server: str, model: str, key_file: str | None, timeout: float, retries: int, concurrency: int):
        self._server, self._model, self._retries, self._concurrency = server, model, retries, concurrency
        headers = {}
        if key_file is not None:
            try:
                headers["Authorization"] = f"Bearer {Path(key_file).expanduser().read_text(encoding='utf-8').strip()}"
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"key_file={key_file!r} cannot be read ({error}); name a text file") from error
        self._client = open_client(server, headers, timeout)

    def check(self) -> None:
        """Sees that the server is there and has the model.

        Raises:
            ValueError: It is not, or has others.
        """
        try:
            answer = self._client.get("models", timeout=HEALTH_SECONDS)
            answer.raise_for_status()
            names = [str(model["id"]) for model in answer.json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            failed = isinstance(error, httpx.HTTPStatusError)
            why = f"HTTP {error.response.status_code}" if failed else in_words(error)
            raise ValueError(
                f"server={self._server!r} does not list its models ({why}); start it, or write http://HOST:PORT/v1"
            ) from error
        if self._model not in names:
            raise ValueError(f"server={self._server!r} has no model={self._model!r}; give one of {', '.join(names)}")

    def answer(self, images: list[Image.Image], questions: list[str], max_tokens: int) -> list[str | Exception]:
        """Ask one question about each of B images.

        Returns:
            B answers, or what went wrong.
        """
        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(self._ask, images, questions, [max_tokens] * len(images)))

    def _ask(self, image: Image.Image, question: str, max_tokens: int) -> str | Exception:
        failure: Exception = RuntimeError("not asked")
        for attempt in range(self._retries + 1):
            time.sleep(0.5 * 2 ** (attempt - 1) if attempt else 0)
            try:
                answer = self._client.post("chat/completions", json=self._request(image, question, max_tokens))
                answer.raise_for_status()
                content = answer.json()["choices"][0]["message"]["content"]
                return content if isinstance(content, str) else ValueError(f"the answer is {content!r:.60}, no text")
            except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
                failure = error
                status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 500
                if status < 500 and status not in (408, 429):
                    break
        return failure

    def _request(self, image: Image.Image, question: str, max_tokens: int) -> dict[str, Any]:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG", compress_level=1)
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
