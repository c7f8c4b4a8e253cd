"""What the device computes in a step and the host wants to know, read without making the device wait."""

import time
from collections import deque

import torch

# FLOPs of a step on one device: 0.2 seconds of an H100 at half of its peak. Beside longer steps it is little that the
# device waits for the host between them, and a request to stop should not wait for one more.
_LONG_STEP = 1e14


class StepNumbers:
    """
    A GPU works through what it is given while the host prepares more. A host that reads the loss of a step waits for
    that step, and then the GPU waits for the host. So on CUDA the numbers of a short step are read when the step after
    it has been given; those of long steps, and elsewhere all, at once.

    The seconds of a step are those between two readings. Where the host is the slower one, the last step before
    something else has next to none left: the step before it had them.
    """

    def __init__(self, device, flops):
        """
        Args:
            device: torch.device of the numbers.
            flops: of a step on one device; the same on every process, so that all of them read the same steps at the
                same time.
        """
        self._is_cuda = device.type == "cuda"
        self._lag = 1 if self._is_cuda and flops < _LONG_STEP else 0
        self._waiting = deque()
        self._since = time.perf_counter()

    def start_step(self):
        """The time until now belongs to no step, unless one is still under way."""
        if not self._waiting:
            self._since = time.perf_counter()

    def put(self, numbers, about):
        """
        Args:
            numbers: 1-D tensor on the device; on CUDA the host does not wait for it here.
            about: what comes back with them.
        """
        numbers = numbers.detach().to("cpu", non_blocking=self._is_cuda)  # from CUDA into pinned memory
        has_come = None
        if self._is_cuda:
            has_come = torch.cuda.Event()
            has_come.record()
        self._waiting.append((numbers, has_come, about))

    def read(self, is_all_wanted):
        """
        Args:
            is_all_wanted: function that says whether to wait for the newest step too; asked before each step.

        Yields:
            (list of floats, about, seconds that the step took) of each step, oldest first.
        """
        while len(self._waiting) > (0 if is_all_wanted() else self._lag):
            numbers, has_come, about = self._waiting.popleft()
            if has_come is not None:
                has_come.synchronize()
            now = time.perf_counter()
            seconds, self._since = now - self._since, now
            yield numbers.tolist(), about, seconds
