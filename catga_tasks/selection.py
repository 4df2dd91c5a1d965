"""Which messages does somebody mean? Conditions that commands and the Outbox tab share."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import text

from catga_tasks.tables import dialect, later

if TYPE_CHECKING:
    from sqlalchemy import Connection

#: Seconds in an age's units.
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
#: The part of the headers that describes a task's arguments, cut out of their JSON: they may be garbage.
_ARGUMENTS = {
    "postgresql": """split_part(split_part(headers, '"argsrepr": ', 2), '"origin": ', 1)""",
    "sqlite": """CASE WHEN instr(headers, '"argsrepr": ') > 0 THEN substr(substr(headers, instr(headers,
        '"argsrepr": ')), 1, instr(substr(headers, instr(headers, '"argsrepr": ')) || '"origin": ', '"origin": ') - 1)
        ELSE '' END""",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which messages: all that meet every condition given.

    `older_than` is in seconds. `text` is looked for in the names, ids and errors, whatever its case, and with
    `in_arguments` in what the headers say of the arguments. `dead_by` is a moment, as the database writes it: dead
    letters that died later are left out.
    """

    ids: tuple[int, ...] = ()
    task: str | None = None
    queue: str | None = None
    older_than: float | None = None
    text: str | None = None
    in_arguments: bool = True
    dead_by: str | None = None

    def __bool__(self) -> bool:
        return bool(self.ids or self.task or self.queue or self.older_than is not None or self.text)

    def as_dict(self) -> dict[str, Any]:
        """Return the conditions that are given, for the record."""
        given = {"ids": list(self.ids), "task": self.task, "queue": self.queue, "older_than": self.older_than}
        return {name: value for name, value in {**given, "text": self.text}.items() if value not in (None, [], "")}


def seconds(age: str) -> float:
    """Return the seconds in an age such as 90, 90s, 15m, 2h or 7d; raise `ValueError` that says how to write one."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", age)
    if found is None:
        message = f"{age!r} is not an age; write 90s, 15m, 2h or 7d."
        raise ValueError(message)
    return float(found[1]) * _UNITS[found[2]]


def conditions(connection: Connection, table: str, selection: Selection) -> tuple[str, dict[str, Any]]:
    """Return the WHERE clause on `catga_outbox` or `catga_dead_letters`, empty without conditions, and its values."""
    dead = table == "catga_dead_letters"
    clauses: list[str] = []
    values: dict[str, Any] = {}
    if selection.ids:
        clauses, values = ["id IN :ids"], {"ids": list(selection.ids)}
    for name in ("task", "queue"):
        if value := getattr(selection, name):
            clauses.append(f"{name} = :{name}")
            values[name] = value
    if selection.older_than is not None:
        clauses.append(f"{'died_at' if dead else 'created_at'} < {later(connection, 'ago')}")
        values["ago"] = -selection.older_than
    if selection.dead_by is not None and dead:
        moment = "CAST(:dead_by AS timestamptz)" if dialect(connection) == "postgresql" else ":dead_by"
        clauses.append(f"died_at <= {moment}")
        values["dead_by"] = selection.dead_by
    if selection.text:
        clauses.append(_contains(connection, dead=dead, arguments=selection.in_arguments))
        # What is stored as JSON has its own escapes.
        values |= {"plain": _like(selection.text), "encoded": _like(json.dumps(selection.text)[1:-1])}
    return (" WHERE " + " AND ".join(clauses) if clauses else ""), values


def bound(statement: str, selection: Selection) -> sa.TextClause:
    """Return the statement, with as many places for ids as there are."""
    clause = text(statement)
    return clause.bindparams(sa.bindparam("ids", expanding=True)) if selection.ids else clause


def _contains(connection: Connection, *, dead: bool, arguments: bool) -> str:
    like = "ILIKE" if dialect(connection) == "postgresql" else "LIKE"
    places = dict.fromkeys(["task", "task_id", "queue", *(["error"] if dead else [])], "plain")
    places |= dict.fromkeys(
        ["coalesce(history, '')", *([_ARGUMENTS[dialect(connection)]] if arguments else [])], "encoded"
    )
    return "(" + " OR ".join(f"{place} {like} :{value} ESCAPE '!'" for place, value in places.items()) + ")"


def _like(words: str) -> str:
    for special in "!%_":
        words = words.replace(special, f"!{special}")
    return f"%{words}%"
