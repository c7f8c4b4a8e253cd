"""The Hugging Face Hub: find out whether it can be reached, and repeat requests that fail."""

import functools
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from common.errors import UserError, one_line

PROBE_SECONDS = 10
ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 1.0  # then 2, 4, ...: half a minute in total
_LONGEST_PAUSE_SECONDS = 120.0
_TEMPORARY = (408, 416, 429)  # of the statuses 4xx, which otherwise mean that another attempt cannot help

Result = TypeVar("Result")


@functools.cache
def hub_error() -> str | None:
    """Return why the Hub cannot be reached, or None if it answers within PROBE_SECONDS; cached.

    The Hub's own clients retry each file for over 20 seconds before they use their cache. If this function returns a
    reason, pass local_files_only (or set HF_HUB_OFFLINE) to read the cache at once. The probe uses the Hub's client,
    so that HF_ENDPOINT, HF_HUB_OFFLINE and proxy settings apply.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    reason: str | None = f"{constants.ENDPOINT} did not answer in {PROBE_SECONDS} seconds"

    def probe() -> None:
        nonlocal reason
        try:
            get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
            reason = None
        except OfflineModeIsEnabled:
            reason = "HF_HUB_OFFLINE is set"
        except Exception as error:  # its class depends on the client's HTTP library
            reason = f"{constants.ENDPOINT} cannot be reached: {error}"

    # The client's timeout counts per address of the host and does not cover the DNS lookup.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return reason


class HubRequestError(Exception):
    """A request that failed for good. It does not refer to the client's exception, which has the user's token."""

    def __init__(self, error: Exception) -> None:
        """Describe an exception of huggingface_hub."""
        from huggingface_hub import constants

        cause: BaseException = error  # where the network fails, the client says "not in the cache", because of ...
        while getattr(cause, "response", None) is None and cause.__cause__ is not None:
            cause = cause.__cause__
        response = getattr(cause, "response", None)
        self.attempts = 1
        self.status: int | None = getattr(response, "status_code", None)
        """HTTP status; None without a response"""
        self.is_from_hub = response is not None and str(response.url).startswith(constants.ENDPOINT)
        """True if the Hub itself responded, not its storage"""
        self.retry_after = str(response.headers.get("retry-after", "")) if response is not None else ""
        if self.status is None:
            self.is_final = isinstance(error, ValueError)  # the response is not what a Hub sends
            self.reason = f"{type(cause).__name__}: {one_line(cause, 200)}"
        else:
            # 403 from the storage: a signed address has expired, and another attempt gets a new one.
            is_expired = self.status == 403 and not self.is_from_hub
            self.is_final = 400 <= self.status < 500 and self.status not in _TEMPORARY and not is_expired
            server_message = " ".join((getattr(cause, "server_message", None) or "").split())
            self.reason = f"HTTP {self.status}" + (f", {server_message[:200]}" if server_message else "")
        super().__init__(self.reason)


def with_retries(
    call: Callable[[], Result],
    *,
    raises: tuple[type[Exception], ...] = (),
    log: Callable[[str], object] = lambda line: None,
) -> Result:
    """Return call(), and try again after errors that may be temporary, with growing pauses.

    huggingface_hub itself repeats only some requests: uploads and downloads of files, but not commits and listings.

    Args:
        call: makes requests with huggingface_hub.
        raises: exceptions to pass on to the caller at once.
        log: called with a line before each pause.

    Raises:
        HubRequestError: no attempt succeeded.
        OSError: a local file cannot be read or written.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # The first base is the error class of the HTTP library (httpx, httpx2), which depends on the version.
    errors: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError, RuntimeError, ValueError)
    passed_on: tuple[type[Exception], ...] = (UserError, *raises)  # UserError: of another request inside the call
    attempt = 1
    while True:
        try:
            return call()
        except passed_on:
            raise
        except errors as error:
            if getattr(error, "errno", None) and not isinstance(error, ConnectionError | TimeoutError):
                raise
            failure = HubRequestError(error)
        # Outside of the except block, or the client's exception would be attached to this one.
        failure.attempts = attempt
        if failure.is_final or attempt >= ATTEMPTS:
            raise failure
        pause = FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)
        if failure.retry_after.isdigit():
            pause = min(max(pause, float(failure.retry_after)), _LONGEST_PAUSE_SECONDS)
        log(f"{failure.reason}; trying again in {pause:.0f} s")
        time.sleep(pause)
        attempt += 1
