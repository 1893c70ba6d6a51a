"""The page and the figures of a finished run, made from the records it left on disk."""

from attsvm.report.atlas_render import atlas_html, is_atlas, render_atlas, render_comparison
from attsvm.report.build import read_page
from attsvm.report.gallery import is_gallery, is_recipe, render_gallery, render_recipe
from attsvm.report.render import render_run

__all__ = [
    "atlas_html",
    "is_atlas",
    "is_gallery",
    "is_recipe",
    "read_page",
    "render_atlas",
    "render_comparison",
    "render_gallery",
    "render_recipe",
    "render_run",
]
