"""Requests and replies of the wire protocol (:mod:`.wire`): call the operation, and describe its result or failure."""

from __future__ import annotations

from typing import Any


def carry_out(operations: object, request: dict[str, Any], blob: bytes) -> tuple[dict[str, object], bytes]:
    """Call the method of ``operations`` that the request names. Returns the reply and its blob, and never raises."""
    reply: dict[str, object] = {"id": request.get("id")}
    out: bytes | None = None
    try:
        arguments = request.get("args") or {}
        result = getattr(operations, request["op"])(**arguments, **({"blob": blob} if blob else {}))
        reply["ok"], out = _split(result)
        reply["blob"] = out is not None
    except OSError as e:
        reply["errno"], reply["call"] = e.errno, e.filename or "system call"
    except Exception:
        import traceback  # seldom needed, and slow to load on an emulated CPU

        reply["fault"] = traceback.format_exc()
    return reply, out or b""


def _split(result: object) -> tuple[object, bytes | None]:
    """Split a result into its JSON value and its blob, None if it has no blob."""
    if isinstance(result, bytes):
        return None, result
    if isinstance(result, tuple) and isinstance(result[-1], bytes):
        return result[0], result[1]
    return result, None
