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
from attsvm.selection.graph import TokenPriorityGraph
from attsvm.selection.next_token import CyclicSubspace, cyclic_subspace, graph_selection
from attsvm.selection.norms import Norm
from attsvm.selection.problem import TokenSelection

__all__ = [
    "Certificate",
    "CyclicSubspace",
    "Norm",
    "RayCheck",
    "TokenPriorityGraph",
    "TokenSelection",
    "certify",
    "check_ray",
    "correlation",
    "cyclic_subspace",
    "graph_selection",
    "in_cone",
    "is_locally_optimal",
    "score_cone_margin",
    "support_tokens",
    "token_scores",
]
