"""
Into the world: a checkpoint on the Hub, in other engines' formats, and on a page to try it.

    push.py, card.py                       python -m hub push CHECKPOINT USER/NAME: one commit, model card included
    export.py, to_onnx.py, to_gguf.py      python -m hub export CHECKPOINT --to gpt2|onnx|gguf
    demo.py                                python -m hub demo CHECKPOINT [CHECKPOINT]
    continuation.py                        text as a model writes it, token by token: what demo.py and sample.py show
"""

from common.errors import UserError


class HubError(UserError):
    """An error about sharing or exporting that the user can fix."""
