"""Whole experiments: from data to records on disk."""

from attsvm.experiments.config import VerifyConfig
from attsvm.experiments.verify import verify

__all__ = ["VerifyConfig", "verify"]
