"""Download one file over HTTP: continue where the last attempt stopped, try again when the line fails."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from stage_grpo.checksums import sha256_of

_CHUNK = 1 << 16
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_RANGE_PAST_END = 416
_LINE_FAILURES = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)


@dataclass(frozen=True)
class Patience:
    """How long to put up with a bad line.

    Attributes:
        attempts: Tries in all.
        first_wait: Seconds before the second try; doubled before each further one.
        timeout: Seconds without a byte after which a try has failed.
    """

    attempts: int = 5
    first_wait: float = 1.0
    timeout: float = 30.0


def check_sha256(path: Path, sha256: str, problem: str, remedy: str) -> None:
    """Refuse a file whose bytes are not the expected ones.

    Args:
        path: The file.
        sha256: What its SHA-256 must be, or begin with.
        problem: What it means if it is not.
        remedy: What to do then.

    Raises:
        ValueError: Another checksum; both are named.
    """
    found = sha256_of(path)
    if not found.startswith(sha256):
        shown = sha256 if len(sha256) == len(found) else f"{sha256}..."
        raise ValueError(f"{problem}: its SHA-256 is {found}, not {shown}; {remedy}")


def download_checked(
    url: str, part: Path, label: str, sha256: str, by_hand: str, patience: Patience | None = None
) -> None:
    """Download as :func:`download`, and keep the result only if its checksum is right.

    Args:
        url: An http or https address.
        part: File to write; its folder exists, and what it holds already is continued.
        label: What the progress bar calls it.
        sha256: What the content's SHA-256 must be, or begin with; empty for unknown.
        by_hand: How else to get the file, for the message.
        patience: Tries and waits.

    Raises:
        ValueError: The content has another checksum; it is not kept.
        OSError: The content cannot be had, or ``part`` cannot be written.
    """
    continued = part.exists()
    if continued and sha256 and sha256_of(part).startswith(sha256):
        return
    try:
        download(url, part, label, patience, checked=bool(sha256))
        if continued and not sha256_of(part).startswith(sha256):
            # What lay there may have been wrong from the start; only a fresh copy tells.
            part.unlink()
            download(url, part, label, patience, checked=True)
    except OSError as error:
        raise OSError(f"{error}; {by_hand}") from error
    try:
        check_sha256(part, sha256, f"what {url} sent is not the official file", by_hand)
    except ValueError:
        part.unlink()
        raise


def download(url: str, part: Path, label: str, patience: Patience | None = None, checked: bool = False) -> None:
    """Brings ``part`` up to the whole content of ``url``, showing a progress bar on a terminal.

    Bytes that ``part`` already holds are taken for the beginning of the content and not fetched again, if the
    server can do that. After an error ``part`` keeps what came.

    Args:
        url: An http or https address.
        part: File to append to; its folder exists.
        label: What the progress bar calls it.
        patience: Tries and waits.
        checked: Whether whoever calls knows a checksum. If not, the content's ETag is kept in a file beside ``part``
            meanwhile, and only the bytes of that version are continued.

    Raises:
        OSError: The content cannot be had, or ``part`` cannot be written; the message says which and why.
    """
    patience = patience or Patience()
    problem = ""
    for attempt in range(patience.attempts):
        time.sleep(patience.first_wait * 2 ** (attempt - 1) if attempt else 0)
        try:
            _append(url, part, label, patience.timeout, checked)
            _tag_file(part).unlink(missing_ok=True)
            return
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code == _RANGE_PAST_END:
                part.unlink(missing_ok=True)
            elif error.code not in _TRANSIENT:
                break
        except _LINE_FAILURES as error:
            reason = getattr(error, "reason", error)
            problem = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            # Without a name server there is no line to wait for.
            if isinstance(reason, socket.gaierror):
                break
        except OSError as error:
            raise OSError(f"cannot save {url} as {part} ({error.strerror})") from error
    raise OSError(f"cannot download {url} ({problem})")


def _tag_file(part: Path) -> Path:
    """Where the ETag of the version is kept that a file of unknown checksum is part of."""
    return part.with_name(f"{part.name}.etag")


def _append(url: str, part: Path, label: str, timeout: float, checked: bool) -> None:
    """One try: append the rest of the content to ``part``, or all of it if the server sends no ranges."""
    tag = _tag_file(part).read_text(encoding="latin-1") if not checked and _tag_file(part).exists() else ""
    start = part.stat().st_size if part.exists() and (checked or tag) else 0
    headers = {"User-Agent": "stage-grpo"} | ({"Range": f"bytes={start}-"} if start else {})
    headers |= {"If-Range": tag} if start and tag else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
        continued = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        sent_tag = response.headers.get("ETag", "")
        if response.status == http.client.PARTIAL_CONTENT and (not continued or tag not in ("", sent_tag)):
            part.unlink()
            raise http.client.HTTPException("the server sent another range or version than it was asked for")
        start = start if response.status == http.client.PARTIAL_CONTENT else 0
        if not checked and not start:
            part.unlink(missing_ok=True)  # so that no bytes ever lie beside the tag of others
            # A weak one may stand for several versions.
            _tag_file(part).write_text("" if sent_tag.startswith("W/") else sent_tag, encoding="latin-1")
        length = response.headers.get("Content-Length")
        end = None if length is None else start + int(length)
        with part.open("ab" if start else "wb") as sink:
            _copy(response, sink, start, end, label)
        # http.client ends a body that was cut short as if it were whole.
        got = part.stat().st_size
        if end is not None and got < end:
            raise http.client.HTTPException(f"the connection was cut after {got} of {end} bytes")


def _copy(response: http.client.HTTPResponse, sink: IO[bytes], start: int, end: int | None, label: str) -> None:
    with tqdm(desc=label, initial=start, total=end, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        while chunk := response.read1(_CHUNK):
            sink.write(chunk)
            bar.update(len(chunk))
