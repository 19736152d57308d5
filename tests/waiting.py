"""How long tests wait for what may never come."""

import time
from collections.abc import Callable

HANG_SECONDS = 1800
"""What takes longer hangs: ten times what the longest wait takes on a busy machine. No test measures a speed by it."""


def wait_until(
    happened: Callable[[], object], is_alive: Callable[[], bool] = lambda: True, why: Callable[[], str] = str
) -> None:
    """Looks again and again.

    Args:
        is_alive: whether what should make it happen still runs; once it has ended there is nothing to wait for.
        why: what a failure is told with.
    """
    deadline = time.monotonic() + HANG_SECONDS
    while not happened():
        assert (is_alive() or happened()) and time.monotonic() < deadline, why()
        time.sleep(0.02)
