"""Check whether the Hugging Face Hub can be reached."""

import functools
import threading

PROBE_SECONDS = 10


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
