"""The wire between lab and agent: length-prefixed JSON with an optional blob, over two byte streams.

A message is ``u32 length of JSON, u32 length of blob`` (little endian), the JSON, the blob. A request
is ``{"id", "op", "args"}``; its answer ``{"id"}`` with one of ``"ok"`` (the result), ``"errno"`` and
``"call"`` (a system call failed), ``"fault"`` (the agent's own traceback). Shared by both ends.
"""

import json
import struct

HEADER = struct.Struct("<II")


def encode(message: dict, blob: bytes = b"") -> bytes:
    text = json.dumps(message, separators=(",", ":")).encode()
    return HEADER.pack(len(text), len(blob)) + text + blob


def decode(read) -> "tuple[dict, bytes]":
    """One message from ``read(n) -> exactly n bytes``. EOFError when the stream ends."""
    text, blob = HEADER.unpack(read(HEADER.size))
    message = json.loads(read(text))
    return message, read(blob) if blob else b""
