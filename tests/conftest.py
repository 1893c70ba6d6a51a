"""What holds for every test: one source of randomness, one thread, no network beyond this machine, no real cache."""

from __future__ import annotations

import os

# Before NumPy, torch and numba start their threads. Workers of pytest-xdist run side by side, each on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import ipaddress
import shutil
import socket
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

# Folders of real weights, as fixtures for all tests.
pytest_plugins = ["weights.fixtures"]

SEED = 20230831
SOURCE = Path(__file__).resolve().parents[1] / "src" / "attsvm"

torch.set_num_threads(1)

# The same examples on every run, so that a failure can be looked at again; ATTSVM_HYPOTHESIS=explore looks further.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("ATTSVM_HYPOTHESIS", "default"))


class NetworkBlockedError(RuntimeError):
    """A test reached for the network. Not an OSError, so that no retry or fallback takes it for a bad line."""


def _is_local(host: Any) -> bool:
    if host is None or host in ("", b"", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError:
        return False


def _refuse(what: str, host: Any) -> None:
    if not _is_local(host):
        raise NetworkBlockedError(f"{what}: tests may not reach the network beyond loopback, got {host!r}.")


def _guarded(name: str, address_at: int) -> Callable[..., Any]:
    original = getattr(socket.socket, name)

    @wraps(original)
    def guarded(self: socket.socket, *args: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse(f"socket.{name}", args[address_at][0])
        return original(self, *args)

    return guarded


def _block_network() -> None:
    for name, address_at in (("connect", 0), ("connect_ex", 0), ("sendto", -1)):
        setattr(socket.socket, name, _guarded(name, address_at))
    for name in ("getaddrinfo", "gethostbyname"):
        original = getattr(socket, name)

        def guarded(host: Any, *args: Any, _original: Any = original, _name: str = name, **options: Any) -> Any:
            _refuse(f"socket.{_name}", host)
            return _original(host, *args, **options)

        setattr(socket, name, wraps(original)(guarded))


def _check_types_at_run_time() -> None:
    """Check every jaxtyping annotation of the package with beartype; ATTSVM_TYPECHECK=0 turns it off."""
    if os.environ.get("ATTSVM_TYPECHECK") == "0":
        return
    annotated = [
        ".".join(("attsvm", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for path in SOURCE.rglob("*.py")
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    ]
    if annotated:
        from jaxtyping import install_import_hook

        install_import_hook(annotated, "beartype.beartype")


def pytest_configure(config: pytest.Config) -> None:
    """Before anything of attsvm is imported; also in every worker of pytest-xdist."""
    _block_network()
    _check_types_at_run_time()
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="attsvm-tests-")
        os.environ["ATTSVM_CACHE"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, and say so, what this machine cannot run; ATTSVM_REQUIRE_BROWSER=1 lets the browser tests fail instead."""
    absent = {}
    if shutil.which("chromium") is None and os.environ.get("ATTSVM_REQUIRE_BROWSER") != "1":
        absent["browser"] = "Chromium is not installed (Debian: apt-get install chromium)"
    if not torch.cuda.is_available():
        absent["gpu"] = "there is no CUDA device"
    for item in items:
        for marker, reason in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def rng() -> np.random.Generator:
    """NumPy's randomness of one test; always the same."""
    return np.random.default_rng(SEED)


@pytest.fixture
def generator() -> torch.Generator:
    """torch's randomness of one test, on the CPU; always the same."""
    return torch.Generator().manual_seed(SEED)
