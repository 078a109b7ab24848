"""A deadline for what asks the network, which may not answer for minutes."""

from collections.abc import Callable
from threading import Thread

REACH_S = 8.0


def within(seconds: float, ask: Callable[[], object]) -> None:
    """Ask in another thread, and raise what it raises.

    Raises:
        TimeoutError: it has not returned in time. Not even resolving a name has a timeout of its own.
    """
    raised: list[Exception] = []

    def run() -> None:
        try:
            ask()
        except Exception as error:
            raised.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if raised:
        raise raised[0]
