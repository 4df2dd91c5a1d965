"""What does a consumer get whose message is garbage? A message with `errors`, instead of an exception of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from kombu import message as kombu_message
from kombu.transport import virtual
from kombu.utils.json import dumps

#: Takes a queue's name, bytes that aren't a message and what is wrong with them; returns whether it keeps them.
Keeper = Callable[[str, bytes, str], bool]


class Message(virtual.Message):
    """A delivered message. If a part can't be read, its body is all of it as JSON, and kombu calls `on_decode_error`.

    kombu's own raises while the transport delivers: a worker would end, and so would the next one that meets it.
    """

    def __init__(self, payload: dict[str, Any], channel: Any = None, **options: Any) -> None:
        try:
            super().__init__(payload, channel, **options)
        except Exception:
            self.errors = [sys.exc_info()]
            properties = payload["properties"]
            kombu_message.Message.__init__(
                self,
                body=dumps(payload).encode(),
                channel=channel,
                delivery_tag=properties["delivery_tag"],
                content_type="application/json",
                content_encoding="utf-8",
                delivery_info=properties["delivery_info"],
            )
