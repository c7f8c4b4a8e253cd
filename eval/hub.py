"""Whether the Hugging Face Hub can be reached."""

import functools
import threading

PROBE_SECONDS = 10


@functools.cache
def why_unreachable():
    """
    Asks the configured endpoint, once a process. The Hub's own clients retry each file for 20 seconds and more before
    they turn to their cache; who asks here first can send them there at once.

    HF_ENDPOINT, HF_HUB_OFFLINE and the proxy settings hold, since it is the Hub's own client that asks.

    Returns:
        None if something answers, else the reason as a phrase; after PROBE_SECONDS at the latest.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    why = f"{constants.ENDPOINT} did not answer in {PROBE_SECONDS} seconds"

    def ask():
        nonlocal why
        try:
            get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
            why = None
        except OfflineModeIsEnabled:
            why = "HF_HUB_OFFLINE is set"
        except Exception as error:  # which one depends on the HTTP library of this version of the client
            why = f"{constants.ENDPOINT} cannot be reached: {error}"

    # The client's timeout is for each address of the host, and does not hold while its name is looked up.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return why
