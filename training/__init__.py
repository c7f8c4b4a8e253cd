"""Training: everything outside train.py that has tests of its own.

Independent of the data's format and of the evaluation: train.py combines the packages.
"""

from common.errors import UserError


class TrainingError(UserError):
    """An error of a run that the user can fix."""
