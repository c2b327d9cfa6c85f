"""The wire between lab and agent: length-prefixed JSON with an optional blob, over two byte streams.

A message is ``u32 length of JSON, u32 length of blob`` (little endian), the JSON, the blob. A request
is ``{"id", "op", "args"}``; its answer ``{"id"}`` with one of ``"ok"`` (the result; ``"blob"`` is true where bytes
belong to it), ``"errno"`` and ``"call"`` (a system call failed), ``"fault"`` (the agent's own traceback). Shared by
both ends.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

HEADER = struct.Struct("<II")


def encode(message: dict[str, Any], blob: bytes = b"") -> bytes:
    text = json.dumps(message, separators=(",", ":")).encode()
    return HEADER.pack(len(text), len(blob)) + text + blob


def decode(read: Callable[[int], bytes]) -> tuple[dict[str, Any], bytes]:
    """One message from ``read(n) -> exactly n bytes``. EOFError when the stream ends."""
    text, blob = HEADER.unpack(read(HEADER.size))
    message = json.loads(read(text))
    return message, read(blob) if blob else b""
