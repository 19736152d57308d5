"""Work in a thread, while the one that waits for it looks after it and takes signals."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from waiting import HANG_SECONDS

from vlskv_ray.launch.watch import run_in_thread, signals_to


@pytest.fixture
def handlers() -> Iterator[list[object]]:
    """Of both signals; they are as they were at the end of the test, and so they are given back whatever it did."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield before
    now = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)
    assert now == before


def test_what_the_work_returns_comes_back_after_a_last_look() -> None:
    looked: list[bool] = []
    going_on = threading.Event()

    def work() -> int:
        assert going_on.wait(HANG_SECONDS)
        return 3

    def look() -> bool:
        looked.append(going_on.is_set())
        if len(looked) == 2:
            going_on.set()
        return False

    ended = run_in_thread(work, look, every=0.01)
    assert ended is not None and ended.result() == 3
    assert looked[:2] == [False, False] and looked[-1]


def test_what_the_work_raises_is_kept_for_who_asks() -> None:
    """Whatever it is: also what would end an interpreter."""
    for error in (ValueError("wrong"), SystemExit(3), KeyboardInterrupt()):

        def work(error: BaseException = error) -> None:
            raise error

        ended = run_in_thread(work, lambda: False, every=0.01)
        assert ended is not None and ended.exception() is error
        with pytest.raises(type(error)):
            ended.result()


def test_work_can_be_left_and_what_a_look_raises_leaves_it_too() -> None:
    """It is told of then, to be ended if possible; else it goes on in its thread, which does not keep the process
    alive."""
    let_go = threading.Event()
    threads: list[threading.Thread] = []
    left: list[Future[None]] = []

    def work() -> None:
        threads.append(threading.current_thread())
        let_go.wait(HANG_SECONDS)

    def look() -> bool:
        raise ValueError("the look")

    try:
        assert run_in_thread(work, lambda: True, 0.01, left.append) is None
        with pytest.raises(ValueError, match="the look"):
            run_in_thread(work, look, 0.01, left.append)
        assert [(thread.is_alive(), thread.daemon) for thread in threads] == [(True, True)] * 2
        assert [future.done() for future in left] == [False, False]
    finally:
        let_go.set()
    for future in left:
        assert future.result(HANG_SECONDS) is None
    assert run_in_thread(work, lambda: False, 0.01, left.append) is not None
    assert len(left) == 2  # this one has ended


def test_signals_are_taken_while_work_goes_on_and_given_back(handlers: list[object]) -> None:
    """Also where what is done meanwhile fails."""
    taken: list[int] = []
    asked = threading.Event()

    def take(number: int) -> None:
        taken.append(number)
        if len(taken) == 2:
            asked.set()

    def look() -> bool:
        if not asked.is_set():
            os.kill(os.getpid(), (signal.SIGINT, signal.SIGTERM)[len(taken)])
        return False

    with signals_to(take):
        run_in_thread(lambda: asked.wait(HANG_SECONDS), look, every=0.01)
    assert taken == [signal.SIGINT, signal.SIGTERM]
    with pytest.raises(ValueError, match="meanwhile"), signals_to(take):
        raise ValueError("meanwhile")


def test_only_the_main_thread_takes_signals(handlers: list[object]) -> None:
    """In another, as a trial's, nothing is changed and nothing fails."""

    def work() -> list[object]:
        with signals_to(lambda number: None):
            return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    ended = run_in_thread(work, lambda: False, every=0.01)
    assert ended is not None and ended.result() == handlers
