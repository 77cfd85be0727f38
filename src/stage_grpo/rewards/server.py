"""A reward as a small web service: ``stage serve-reward NAME``. The other end is ``stage_grpo.rewards.remote``."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stage_grpo.rewards.base import Reward
from stage_grpo.rewards.protocol import PROTOCOL, Limits, ProtocolError, decode_request, encode_response

logger = logging.getLogger(__name__)

MAX_WAITING = 32
"""Requests that may wait for their turn; a client whose request is turned away tries again later."""
BODY_SECONDS = 60.0
"""How long a client may take to send its request."""


def make_app(reward: Reward, token: str | None = None, limits: Limits | None = None) -> Starlette:
    """The web application of one reward.

    ``POST /score`` scores, ``GET /health`` says who is there. Requests are scored one after the other, whoever sends
    them, because they share one model.

    Args:
        reward: What scores.
        token: If given, requests must bring it as ``Authorization: Bearer TOKEN``.
        limits: How much one request may hold.
    """
    return Starlette(
        routes=[
            Route("/score", (service := _Service(reward, token, limits or Limits())).score, methods=["POST"]),
            Route("/health", service.health, methods=["GET"]),
        ]
    )


class _Service:
    def __init__(self, reward: Reward, token: str | None, limits: Limits):
        self._reward = reward
        self._token = token
        self._limits = limits
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def health(self, request: Request) -> Response:
        if not self._is_welcome(request):
            return _refusal(401, "the token is missing or wrong")
        return JSONResponse(
            {
                "protocol": PROTOCOL,
                "status": "ok",
                "reward": self._reward.name,
                "waiting": self._waiting,
                "max_images": self._limits.max_images,
                "max_bytes": self._limits.max_bytes,
            }
        )

    async def score(self, request: Request) -> Response:
        if not self._is_welcome(request):
            return _refusal(401, "the token is missing or wrong")
        if self._waiting >= MAX_WAITING:
            return _refusal(503, f"{MAX_WAITING} requests are waiting already; try again later")
        self._waiting += 1
        try:
            inputs = await run_in_threadpool(decode_request, await self._body(request), self._limits)
            async with self._turn:
                if await request.is_disconnected():  # while it waited for its turn
                    raise ClientDisconnect
                result = await run_in_threadpool(self._reward.score, *inputs)
            return Response(encode_response(self._reward.name, result), media_type="application/json")
        except ProtocolError as error:
            return _refusal(error.status, str(error))
        except ClientDisconnect:
            return _refusal(400, "the request was cut off")
        except Exception as error:  # one bad image must not end the service; the client gets no score
            logger.exception("reward %r failed", self._reward.name)
            return _refusal(422, f"reward {self._reward.name!r} failed: {type(error).__name__}: {str(error)[:300]}")
        finally:
            self._waiting -= 1

    def _is_welcome(self, request: Request) -> bool:
        if self._token is None:
            return True
        given = request.headers.get("Authorization", "").encode("latin-1")  # the bytes that came
        return hmac.compare_digest(given, f"Bearer {self._token}".encode())

    async def _body(self, request: Request) -> bytes:
        """Read the body, and stop as soon as it takes too long or is too long, whatever its header says."""
        length = request.headers.get("Content-Length", "0")
        body = bytearray()
        if length.isdecimal() and int(length) > self._limits.max_bytes:
            raise ProtocolError(f"the request has {length} bytes, more than {self._limits.max_bytes}", 413)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self._limits.max_bytes:
                        raise ProtocolError(f"the request has more than {self._limits.max_bytes} bytes", 413)
        except TimeoutError as error:
            raise ProtocolError(f"the request did not arrive in {BODY_SECONDS:g} seconds", 408) from error
        return bytes(body)


def _refusal(status: int, message: str) -> Response:
    return Response(json.dumps({"error": message}), status, media_type="application/json")


def serve(app: Any, host: str, port: int) -> None:
    """Run a web application until it is interrupted."""
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_keep_alive=30, server_header=False)
