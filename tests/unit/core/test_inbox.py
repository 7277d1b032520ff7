from __future__ import annotations

import threading
import time

from core.inbox import InboxThread


def test_orders_run_in_their_order_and_before_the_next_turn() -> None:
    seen: list[str] = []
    done = threading.Event()

    def turn() -> float:
        seen.append("turn")
        return 10.0

    thread = InboxThread("t", turn, lambda error: None)
    for name in ("a", "b"):
        thread.put(lambda name=name: seen.append(name))
    thread.put(lambda: done.set())
    thread.start()
    assert done.wait(5)
    thread.put(lambda: seen.append("c"))  # ends the wait of ten seconds
    thread.end()
    thread.put(lambda: seen.append("never"))
    thread.join()
    assert [step for step in seen if step != "turn"] == ["a", "b", "c"]
    assert seen[:3] == ["a", "b", "turn"]


def test_a_turn_that_has_more_to_do_is_followed_by_another() -> None:
    turns: list[int] = []

    def turn() -> float:
        turns.append(len(turns))
        if len(turns) == 5:
            thread.end()
        return 0.0 if len(turns) < 5 else 10.0

    thread = InboxThread("t", turn, lambda error: None)
    thread.start()
    thread.join()
    assert turns == [0, 1, 2, 3, 4]


def test_an_order_that_raises_ends_the_thread_and_is_told() -> None:
    deaths: list[str] = []

    def fail() -> None:
        raise ValueError("broken")

    thread = InboxThread("t", lambda: 0.0, lambda error: deaths.append(repr(error)))
    thread.put(fail)
    thread.start()
    thread.join()
    assert deaths == ["ValueError('broken')"]


def test_a_thread_has_progress_while_it_works_and_none_while_it_waits() -> None:
    goes_on, is_in_order = threading.Event(), threading.Event()
    in_turns: list[int | None] = []

    def order() -> None:
        is_in_order.set()
        assert goes_on.wait(5)

    def turn() -> float:
        in_turns.append(thread.progress)
        return 10.0

    thread = InboxThread("t", turn, lambda error: None)
    assert thread.progress is None
    thread.put(lambda: None)
    thread.put(order)
    thread.start()
    assert is_in_order.wait(5)
    assert thread.progress == thread.progress == 1, "the first order has ended, the second has not"
    goes_on.set()
    end = time.monotonic() + 5
    while thread.progress is not None:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert in_turns == [2]
    thread.end()
    thread.join()
    assert thread.progress is None
