"""Training data: text -> tokens -> shards -> batches. CONTRIBUTING.md lists the files."""

from common.errors import UserError


class DataError(UserError):
    """An error about the data that the user can fix."""
