"""Training of attention layers, and where it goes."""

from attsvm.dynamics.conditions import (
    Condition,
    Conditions,
    all_support,
    conditions,
    equal_scores,
    first_gradient_separates,
    overparameterised,
)
from attsvm.dynamics.descent import descend
from attsvm.dynamics.fit_head import fit_head, pool
from attsvm.dynamics.flow import GradientFlow
from attsvm.dynamics.heads import LinearHead, QuadraticHead, ReLUHead
from attsvm.dynamics.optimizers import Adam, MirrorDescent, Momentum
from attsvm.dynamics.path import RegularizationPath, regularization_path
from attsvm.dynamics.trajectory import DivergedError, Trajectory
from attsvm.dynamics.verdict import Verdict

__all__ = [
    "Adam",
    "Condition",
    "Conditions",
    "DivergedError",
    "GradientFlow",
    "LinearHead",
    "MirrorDescent",
    "Momentum",
    "QuadraticHead",
    "ReLUHead",
    "RegularizationPath",
    "Trajectory",
    "Verdict",
    "all_support",
    "conditions",
    "descend",
    "equal_scores",
    "first_gradient_separates",
    "fit_head",
    "overparameterised",
    "pool",
    "regularization_path",
]
