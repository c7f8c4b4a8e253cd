"""Kept for training/config.py, which imports `check_trackers` from here; its home is training/logging.py."""

from training.logging import check_trackers

__all__ = ["check_trackers"]
