"""The descriptor that wakes kombu's hub."""

from __future__ import annotations

import os
import select

from catga_tasks.brokers.loop import Bell


def readable(descriptor):
    return bool(select.select([descriptor], [], [], 0)[0])


def test_it_rings_until_it_is_quietened():
    bell = Bell()
    assert not readable(bell.fileno())
    bell.ring()
    bell.ring()
    assert readable(bell.fileno())
    bell.quieten()
    assert not readable(bell.fileno())
    bell.ring()
    assert readable(bell.fileno())
    bell.close()


def test_it_never_touches_what_has_its_number_later():
    """The loop thread may ring when the connection is closed, and the process has opened other files since."""
    bell = Bell()
    before = bell.fileno()
    bell.close()
    ours = [os.pipe2(os.O_NONBLOCK) for _ in range(2)]
    assert before in [descriptor for pair in ours for descriptor in pair]
    os.write(ours[0][1], b"mine")
    bell.ring()
    bell.quieten()
    assert not readable(ours[1][0])
    assert os.read(ours[0][0], 10) == b"mine"
    for descriptor in (*ours[0], *ours[1]):
        os.close(descriptor)
