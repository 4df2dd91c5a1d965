"""How are thousands of calls of one task enqueued at once?

Celery builds one message; what differs from call to call is its id, its arguments and their representation. They are
cut out of the built message once and filled in for each call. Where that could differ from what Celery would do
(signal receivers, another serializer, compression) every message is built by Celery.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Any, overload

from celery import signals
from celery.result import AsyncResult
from celery.utils.saferepr import saferepr
from kombu.exceptions import EncodeError
from kombu.utils.json import JSONEncoder, dumps

from catga_tasks.envelope import Envelope
from catga_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from catga_tasks.app import Catga

#: Marks for what differs from call to call; nothing that a user writes is equal to one by chance.
_ID = f"catga-bulk-id-{os.urandom(8).hex()}"
_ARGUMENTS = f"catga-bulk-arguments-{os.urandom(8).hex()}"
#: Celery cuts the representation of longer arguments short, mark and all.
_MOST_ARGUMENTS = 16
#: A random digit as the digit that says which variant of UUID it is.
_VARIANT = {digit: "89ab"[int(digit, 16) % 4] for digit in "0123456789abcdef"}
_PLAIN = frozenset((int, float, bool, type(None), str))


class Results(Sequence[AsyncResult]):
    """The results of `delay_many`, in the order of its arguments; each is made when it is asked for."""

    def __init__(self, task: Any, ids: list[str]) -> None:
        self.ids = ids
        self._task = task

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> AsyncResult: ...

    @overload
    def __getitem__(self, index: slice) -> Results: ...

    def __getitem__(self, index: int | slice) -> AsyncResult | Results:
        """Return one result, or the results of a slice."""
        if isinstance(index, slice):
            return Results(self._task, self.ids[index])
        return self._task.AsyncResult(self.ids[index])


def send(app: Catga, task: Any, arguments: Iterable[tuple[Any, ...]], options: dict[str, Any]) -> Sequence[AsyncResult]:
    """Enqueue one message a tuple, in one insert."""
    calls = [_checked(args) for args in arguments]
    if not calls:
        return []
    if app.conf.task_always_eager or app.bypasses_outbox(task.name, None):
        return [task.apply_async(args, **options) for args in calls]
    envelopes: list[Envelope] = []
    if _uniform(app, task, options) and 0 < len(calls[0]) <= _MOST_ARGUMENTS:
        build = _template(app, task, options, len(calls[0]))
        check = task.__header__ if app.strict_typing and task.typing else None
        for task_id, args in zip(_ids(len(calls)), calls, strict=True):
            if check is not None:
                check(*args)
            envelopes.append(build(task_id, args))
    else:
        with app.collecting(envelopes):
            sent = [task.apply_async(args, **options) for args in calls]
        app.enqueue(envelopes)
        return sent
    app.enqueue(envelopes)
    results = Results(task, [envelope.task_id for envelope in envelopes])
    parent = app.current_worker_task
    if parent:
        for result in results:
            parent.add_trail(result)
    return results


def _checked(args: Any) -> tuple[Any, ...] | list[Any]:
    if not isinstance(args, (tuple, list)):
        message = f"delay_many takes tuples of positional arguments, such as [(1,), (2,)], not {args!r:.80}."
        raise ConfigurationError(message)
    return args


def _uniform(app: Catga, task: Any, options: dict[str, Any]) -> bool:
    listened = any(
        signal.receivers for signal in (signals.before_task_publish, signals.after_task_publish, signals.task_sent)
    )
    serializer = options.get("serializer") or app.conf.task_serializer
    compression = options.get("compression") or app.conf.task_compression
    simple = serializer == "json" and not compression and app.conf.task_protocol == 2  # noqa: PLR2004 - Celery's number
    own = {"task_id", "stamped_headers", "kwargs", "args", "unique", "unique_key"} & options.keys()
    keyed = task.unique is not None or callable(task.key)
    return simple and not listened and not own and not keyed


def _template(app: Catga, task: Any, options: dict[str, Any], count: int) -> Callable[[str, Any], Envelope]:
    marks = (_ARGUMENTS,) * count
    collected: list[Envelope] = []
    with app.collecting(collected):
        task.apply_async(marks, task_id=_ID, add_to_parent=False, **options)
    first = collected[0]
    headers = _format(first.headers, id=_ID, shown=saferepr(marks))
    properties = _format(first.properties, id=_ID)
    body_before, body_after = first.body.decode().split(dumps(marks), 1)
    encode = JSONEncoder().encode
    longest = app.amqp.argsrepr_maxsize
    # What surrounds the headers, properties and body, by place: `_replace` takes twice the time.
    body = Envelope._fields.index("body")
    before, after = first[1 : body - 2], first[body + 1 :]

    def build(task_id: str, args: Any) -> Envelope:
        try:
            encoded = encode(args)
        except Exception as error:
            # As kombu says it, whatever the encoder raised.
            raise EncodeError(*error.args) from error
        shown = encode_basestring_ascii(_shown(app, args, longest))[1:-1]
        filled = (
            headers % {"id": task_id, "shown": shown},
            properties % {"id": task_id},
            f"{body_before}{encoded}{body_after}".encode(),
        )
        return Envelope._make((task_id, *before, *filled, *after))

    return build


def _format(text: str, **marks: str) -> str:
    """Turn JSON into a format string: each mark, as it stands in a JSON string, becomes the field of its name."""
    text = text.replace("%", "%%")
    for name, mark in marks.items():
        text = text.replace(json.dumps(mark)[1:-1].replace("%", "%%"), f"%({name})s")
    return text


def _ids(count: int) -> list[str]:
    """Return random UUIDs (version 4, RFC 9562) as text, from one draw: `uuid.uuid4` would take a fifth of the time."""
    digits = os.urandom(16 * count).hex()
    ids = (digits[start : start + 32] for start in range(0, 32 * count, 32))
    return [f"{i[:8]}-{i[8:12]}-4{i[13:16]}-{_VARIANT[i[16]]}{i[17:20]}-{i[20:]}" for i in ids]


def _shown(app: Catga, args: Any, longest: int) -> str:
    """Return Celery's representation of the arguments; that of plain values is put together here, for it is simple."""
    if type(args) is tuple and _PLAIN.issuperset(map(type, args)):
        plain = ["'" + arg.replace("'", "\\'") + "'" if type(arg) is str else repr(arg) for arg in args]
        shown = f"({', '.join(plain)}{',' if len(plain) == 1 else ''})"
        if len(shown) < longest:
            return shown
    # Celery 5.6 has no such setting, and three levels.
    return str(saferepr(args, longest, maxlevels=app.conf.get("task_repr_maxlevels", 3)))
