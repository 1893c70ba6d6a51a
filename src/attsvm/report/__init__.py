"""The page and the figures of a finished run, made from the records it left on disk."""

from attsvm.report.build import read_page
from attsvm.report.gallery import is_gallery, is_recipe, render_gallery, render_recipe
from attsvm.report.render import render_run

__all__ = ["is_gallery", "is_recipe", "read_page", "render_gallery", "render_recipe", "render_run"]
