"""The page and the figures of a finished run, made from the records it left on disk."""

from attsvm.report.build import read_page
from attsvm.report.render import render_run

__all__ = ["read_page", "render_run"]
