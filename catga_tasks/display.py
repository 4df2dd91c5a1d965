"""What of a message may people see? Decoded arguments, headers and errors, without what is secret."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from celery.utils.saferepr import saferepr
from kombu.compression import decompress
from kombu.serialization import loads

if TYPE_CHECKING:
    from collections.abc import Mapping

    from celery import Celery

MASK = "***"
#: Formats that can be decoded without running code of the sender's.
_SAFE = ("json", "application/json", "yaml", "application/x-yaml", "msgpack", "application/x-msgpack")
_SECRET = re.compile(
    r"pass(word|wd|phrase)|secret|token|authorization|cookie|credential|api[-_]?key|private[-_]?key", re.IGNORECASE
)
_IN_TEXT = re.compile(
    r"""(?P<name>['"]?(?<![\w-])[\w-]*(?:pass(?:word|wd|phrase)|secret|token|authorization|cookie|credential|api[-_]?key|"""
    r"""private[-_]?key)[\w-]*['"]?\s*[:=]\s*)(?P<value>'[^']*'?|"[^"]*"?|[^\s,;)}\]]+)""",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(://[^:/@\s]*:)[^@\s]+(?=@)")
_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
#: Characters of a list's cell, and of a page's field.
_SHORT, _LONG = 120, 10_000
_DESCRIPTIONS = ("argsrepr", "kwargsrepr")


def without_secrets(words: str) -> str:
    """Hide passwords in URLs, and values beside a name that sounds secret."""
    return _IN_TEXT.sub(rf"\g<name>{MASK}", _IN_URL.sub(rf"\1{MASK}", words))


def masked(value: Any, name: str = "") -> Any:
    """Return the value with whatever has a name that sounds secret hidden, at any depth."""
    if name and _SECRET.search(name):
        return MASK
    if isinstance(value, dict):
        return {key: masked(each, str(key)) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(each) for each in value]
    return without_secrets(value) if isinstance(value, str) else value


def trace_id(headers: Mapping[str, Any]) -> str | None:
    """Return the trace's id of the header `traceparent` (W3C Trace Context), or None."""
    found = _TRACE.match(str(headers.get("traceparent") or ""))
    return found[1] if found else None


def in_short(row: Mapping[str, Any], *, mask_arguments: bool) -> dict[str, Any]:
    """Return a row of a list: its columns, its arguments in short, and the last error."""
    headers = _headers(row["headers"])
    arguments = MASK
    if not mask_arguments:
        arguments = " ".join(str(headers.get(name) or "") for name in _DESCRIPTIONS).strip()
        arguments = _cut(without_secrets(arguments[:_LONG]), _SHORT)
    attempts = _attempts(row["history"])
    error = _error(row) or (attempts[-1]["error"] if attempts else None)
    kept = {name: value for name, value in row.items() if name not in ("headers", "history", "body", "properties")}
    return {**kept, "arguments": arguments, "error": error and _cut(error, _SHORT)}


def in_full(app: Celery, row: Mapping[str, Any], *, mask_arguments: bool) -> dict[str, Any]:
    """Return a message's page: what it carries, how it is sent, and what became of each attempt."""
    headers = _headers(row["headers"])
    args, kwargs, note = (
        ("***", "***", "outbox_mask_arguments is set.") if mask_arguments else _arguments(app, row, headers)
    )
    shown = {
        name: value for name, value in headers.items() if name not in _DESCRIPTIONS and value not in (None, [], {})
    }
    plain = ("id", "state", "task", "task_id", "queue", "broker", "exchange", "routing_key", "priority", "attempts")
    moments = ("created_at", "available_at", "due_in_seconds", "died_at", "content_type", "content_encoding")
    return {
        **{name: row[name] for name in (*plain, *moments)},
        "bytes": len(row["body"]),
        "args": args,
        "kwargs": kwargs,
        "note": note,
        "headers": masked(shown),
        "properties": masked(_headers(row["properties"])),
        "trace_id": trace_id(headers),
        "error": _error(row),
        "history": _attempts(row["history"]),
    }


def _arguments(app: Celery, row: Mapping[str, Any], headers: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """Return positional and keyword arguments as text, and a note if they aren't the decoded ones."""
    described = [without_secrets(str(headers.get(name) or "")) for name in _DESCRIPTIONS]
    try:
        body = bytes(row["body"])
        if compression := headers.get("compression"):
            body = decompress(body, compression)
        args, kwargs, _ = loads(body, row["content_type"], row["content_encoding"], accept=_SAFE)
    except Exception as error:  # noqa: BLE001 - a body may be anything; kombu's and its codecs' errors have no common base
        reason = f"The body ({row['content_type']}) isn't decoded here: {type(error).__name__}. "
        return described[0], described[1], f"{reason}This is how the caller's Celery describes the arguments."
    if not _as_described(app, headers, args, kwargs):
        # argsrepr and kwargsrepr are Celery's way to keep arguments out of logs and events.
        return described[0], described[1], "The caller's own description of the arguments (argsrepr, kwargsrepr)."
    return _pretty(masked(args)), _pretty(masked(kwargs)), None


def _as_described(app: Celery, headers: Mapping[str, Any], args: Any, kwargs: Any) -> bool:
    """Return whether the description is the one that Celery makes by itself. JSON has no tuples."""
    limits = app.amqp.argsrepr_maxsize, app.amqp.kwargsrepr_maxsize
    for name, value, limit in zip(_DESCRIPTIONS, (args, kwargs), limits, strict=True):
        given = headers.get(name)
        if given is not None and _flat(str(given)) != _flat(saferepr(value, limit)):
            return False
    return True


def _flat(words: str) -> str:
    return re.sub(r",?[)\]]", "]", words.replace("(", "["))


def _pretty(value: Any) -> str:
    try:
        return _cut(json.dumps(value, indent=2, ensure_ascii=False, default=repr), _LONG)
    except (TypeError, ValueError):
        return _cut(repr(value), _LONG)


def _attempts(history: str | None) -> list[dict[str, Any]]:
    """Return the attempts, or the text that should have been them as one."""
    try:
        entries = json.loads(history or "[]")
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        entries = [{"error": f"unreadable history: {_cut(str(history), _SHORT)}"}]
    return [
        {
            "attempt": entry.get("attempt"),
            "at": _moment(entry.get("at")),
            "error": without_secrets(_cut(str(entry.get("error")), _LONG)),
        }
        for entry in entries
    ]


def _moment(written: Any) -> float | None:
    """Return what a database wrote as a moment, in seconds since 1970; SQLite's is UTC without saying so."""
    try:
        found = datetime.fromisoformat(str(written))
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _error(row: Mapping[str, Any]) -> str | None:
    return without_secrets(_cut(row["error"], _LONG)) if row["error"] else None


def _headers(stored: str) -> dict[str, Any]:
    try:
        found = json.loads(stored)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _cut(words: str, length: int) -> str:
    return words if len(words) <= length else f"{words[: length - 1]}…"
