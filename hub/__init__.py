"""Publish and export checkpoints: push to the Hub, write other engines' formats, try a checkpoint in the browser.

push.py, card.py, card.md.jinja                  python -m hub push CHECKPOINT USER/NAME
export.py, to_onnx.py, to_gguf.py                python -m hub export CHECKPOINT --to gpt2|onnx|gguf --out DIR
demo.py                                          python -m hub demo CHECKPOINT [CHECKPOINT]
sampling.py                                      text from `generate`, for demo.py and sample.py
"""

from common.errors import UserError


class HubError(UserError):
    """An error in sharing, exporting or sampling that the user can fix."""
