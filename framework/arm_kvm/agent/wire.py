"""The protocol between lab and agent: JSON with an optional blob of bytes, over two byte streams. Both ends use it.

A message is ``u32 length of JSON, u32 length of blob`` (little endian), the JSON, the blob. A request
is ``{"id", "op", "args"}``. The reply is ``{"id"}`` with one of: ``"ok"`` (the result) and ``"blob"`` (whether the blob
is part of it), ``"errno"`` and ``"call"`` (a system call failed), ``"fault"`` (the agent's own traceback).
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
    """Read one message with ``read(n)``, which returns exactly n bytes or raises EOFError at the end of the stream."""
    text, blob = HEADER.unpack(read(HEADER.size))
    message = json.loads(read(text))
    return message, read(blob) if blob else b""
