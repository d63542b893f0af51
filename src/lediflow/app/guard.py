"""What stands between the network and Gradio: only the routes that the page needs, and no path of a client's.

Gradio has routes for much that the page does not do (proxies, downloads by address, streams, code), and its
file routes had holes in the past. Here a request must be one that the page makes; a file must be one that was
uploaded or made; and the browser is told to fetch from nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

_API = "/gradio_api"
_GET = {
    "/",
    "/config",
    "/favicon.ico",
    "/theme.css",
    f"{_API}/app_id",
    f"{_API}/info",
    f"{_API}/queue/data",
    f"{_API}/queue/status",
    f"{_API}/startup-events",
    f"{_API}/theme.css",
    f"{_API}/upload_progress",
}
_GET_BELOW = ("/assets/", "/static/", "/svelte/", f"{_API}/heartbeat/")
_FILE = f"{_API}/file="
_UPLOAD = f"{_API}/upload"
_JOIN = f"{_API}/queue/join"
_POST = {_JOIN, _UPLOAD, f"{_API}/cancel", f"{_API}/component_server", f"{_API}/reset"}
_MOST_JSON = 2**20  # bytes; pictures come by other ways
_HERE = ("127.0.0.1", "localhost", "[::1]")
# Gradio's page evaluates code of its own, and so needs the unsafe words; what counts is that all is from here
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """ASGI middleware.

    Args:
        app: what it stands before.
        folder: where uploads and pictures lie; nothing else is read for a client.
        most_bytes: of the body of an upload or of what was painted.
        local: whether the page is for this machine only; then the address must be this machine's, so that no
            page of the web reaches it under a name of its own (DNS rebinding).
    """

    def __init__(self, app: Any, *, folder: Path, most_bytes: int, local: bool):
        self.app, self.folder, self.most_bytes, self.local = app, folder.resolve(), most_bytes, local

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer with 4xx what the page never asks for; hand on the rest."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets
        status = self._refused(scope)
        if status is not None:
            await _answer(send, status)
            return
        if scope["method"] == "POST":
            path = scope["path"].rstrip("/")
            limit = self.most_bytes if path != _JOIN else _MOST_JSON
            body = await _body(receive, limit)
            if body is None:
                await _answer(send, 413)
                return
            if path == _JOIN and not self._clean(body):
                await _answer(send, 403)
                return
            receive = _again(body, receive)
        await self.app(scope, receive, _with_headers(send))

    def _refused(self, scope: Any) -> int | None:
        method, path = scope["method"], scope["path"]
        if self.local:
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            if len(hosts) != 1 or hosts[0].rsplit(":", 1)[0].lower() not in _HERE:
                return 403
        if "\\" in path or "\0" in path or ".." in unquote(unquote(path)).split("/"):
            return 403
        if method == "POST":
            return None if path.rstrip("/") in _POST else 404
        if method not in ("GET", "HEAD"):
            return 405
        if path.startswith(_FILE):
            return None if self._ours(path[len(_FILE) :]) else 403
        plain = path.rstrip("/") or "/"
        return None if plain in _GET or path.startswith(_GET_BELOW) else 404

    def _ours(self, path: str) -> bool:
        """Whether a path leads to a file below the folder, links followed."""
        try:
            whole = Path(path)
            found = whole.resolve()
            return whole.is_absolute() and found.is_relative_to(self.folder) and found != self.folder
        except (OSError, ValueError, RuntimeError):
            return False

    def _clean(self, body: bytes) -> bool:
        """Whether all files that an event names are ours."""
        try:
            return all(self._ours(path) for path in _paths(json.loads(body)))
        except (ValueError, RecursionError):
            return False


def _paths(value: Any) -> Iterator[str]:
    """Yield what stands under "path" anywhere in JSON; an address under "url" alone is never followed."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name == "path" and part is not None:
                yield part if isinstance(part, str) else ""
            else:
                yield from _paths(part)
    elif isinstance(value, list):
        for part in value:
            yield from _paths(part)


async def _body(receive: Any, most: int) -> bytes | None:
    """Return the body of a request, None where it is larger than allowed or was cut off."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            return None
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes, receive: Any) -> Any:
    """Return what hands over a body that was read already, then whatever comes."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Any:
        return left.pop() if left else await receive()

    return receive_again


def _with_headers(send: Any) -> Any:
    async def send_with(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
        await send(message)

    return send_with


async def _answer(send: Any, status: int) -> None:
    text = {403: b"not allowed", 404: b"not found", 405: b"not allowed", 413: b"too large"}[status]
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *_HEADERS]})
    await send({"type": "http.response.body", "body": text})
