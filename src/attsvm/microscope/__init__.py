"""Which tokens each head of a pretrained model selects, with what margin, and how that compares with max-margin."""

from __future__ import annotations

from attsvm.microscope.atlas import HeadAtlas, HeadRecord
from attsvm.microscope.attentions import from_attentions
from attsvm.microscope.config import InspectConfig
from attsvm.microscope.inspect import inspect, inspect_into

__all__ = ["HeadAtlas", "HeadRecord", "InspectConfig", "from_attentions", "inspect", "inspect_into"]
