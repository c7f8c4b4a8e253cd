"""Switch Python's garbage collector off during training: its pauses would delay the device.

Training steps leave no garbage that needs it. Evaluations do, and collect it themselves (benchmarks/LOG.md).
"""

import contextlib
import gc
from collections.abc import Iterator


def stop_collecting() -> None:
    """Collect once more, and switch the collector off. Later collections skip what exists now."""
    if gc.isenabled():
        gc.collect()
        gc.freeze()
        gc.disable()


@contextlib.contextmanager
def collector_restored() -> Iterator[None]:
    """Switch the collector on again at the end if it was on, for all objects."""
    was_enabled = gc.isenabled()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
