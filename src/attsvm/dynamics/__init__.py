"""Training of one attention layer, and where it goes."""

from attsvm.dynamics.descent import descend
from attsvm.dynamics.heads import fit_head, pool
from attsvm.dynamics.trajectory import Trajectory
from attsvm.dynamics.verdict import Verdict

__all__ = ["Trajectory", "Verdict", "descend", "fit_head", "pool"]
