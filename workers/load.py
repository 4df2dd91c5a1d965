"""Who places the orders? Threads, each with lots of its own: the same seed draws the same orders."""

from __future__ import annotations

import itertools
import random
import threading

from sqlalchemy.exc import InterfaceError, OperationalError

PLACING_THREADS = 4
#: Seconds before the next order when the database is out.
PAUSE = 0.1


class Load:
    """Orders, placed by threads of their own: so many, or without end for None.

    `gate` may be cleared for a pause. With `patient` the customers come back after an outage of the database.
    """

    def __init__(self, orders: int | None, seed: int, *, patient: bool = False) -> None:
        self.gate = threading.Event()
        self.gate.set()
        #: How often the database was out.
        self.outages = 0
        self._patient = patient
        self._stop = threading.Event()
        self._errors: list[Exception] = []
        self._threads = [
            threading.Thread(
                target=self._place,
                args=(None if orders is None else len(range(number, orders, PLACING_THREADS)), seed, number),
            )
            for number in range(PLACING_THREADS)
        ]

    def start(self) -> None:
        """Begin to place orders."""
        for thread in self._threads:
            thread.start()

    def placed(self) -> bool:
        """Return whether all orders are placed; raise what kept one from it."""
        if self._errors:
            raise self._errors[0]
        return not any(thread.is_alive() for thread in self._threads)

    def end(self) -> None:
        """Stop and wait for the orders in hand."""
        self._stop.set()
        self.gate.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _place(self, count: int | None, seed: int, number: int) -> None:
        from workers.shop import place_or_fail

        lots = random.Random(seed * PLACING_THREADS + number)
        try:
            for _ in itertools.count() if count is None else range(count):
                self.gate.wait()
                if self._stop.is_set():
                    return
                try:
                    place_or_fail(lots)
                except (OperationalError, InterfaceError):
                    # Nobody knows whether it was committed, but the database: the audit asks there.
                    if not self._patient:
                        raise
                    self.outages += 1
                    self._stop.wait(PAUSE)
        except Exception as error:  # noqa: BLE001 - raised in the main thread
            self._errors.append(error)
