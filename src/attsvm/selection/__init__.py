"""Which tokens are selected: the problem, its geometry, and what proves an answer."""

from attsvm.selection.certificate import Certificate, RayCheck, certify, check_ray
from attsvm.selection.geometry import (
    correlation,
    in_cone,
    is_locally_optimal,
    score_cone_margin,
    support_tokens,
    token_scores,
)
from attsvm.selection.norms import Norm
from attsvm.selection.problem import TokenSelection

__all__ = [
    "Certificate",
    "Norm",
    "RayCheck",
    "TokenSelection",
    "certify",
    "check_ray",
    "correlation",
    "in_cone",
    "is_locally_optimal",
    "score_cone_margin",
    "support_tokens",
    "token_scores",
]
