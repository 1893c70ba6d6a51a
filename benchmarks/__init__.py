"""Benchmarks of attsvm against named peers: ``python -m benchmarks --help``. Everything runs on one thread."""

import os

# Before the libraries start their threads, here and in the child processes that inherit this.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_name] = "1"
