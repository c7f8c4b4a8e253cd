"""The base class of errors that the user can fix."""


class UserError(ValueError):
    """An error that the user can fix: a command prints it on one line, without a traceback.

    The message says what is wrong, the value, and what to do. Any other exception is a bug and keeps its traceback.
    """

    exit_code = 2
    """of a command that ends with this error: 2, as argparse has it; 1 for a run that had begun"""


def one_line(error: BaseException, max_length: int = 300) -> str:
    """Return an exception's message on one line, or the name of its class where it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."
