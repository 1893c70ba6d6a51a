"""Tests reach no network: the guard of tests/conftest.py does what it says."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

# A documentation address (RFC 5737): nobody answers there, should the guard fail.
ELSEWHERE = ("192.0.2.1", 80)


def test_connections_elsewhere_are_refused() -> None:
    with socket.socket() as tcp, pytest.raises(RuntimeError, match="beyond loopback"):
        tcp.connect(ELSEWHERE)
    with socket.socket() as tcp, pytest.raises(RuntimeError, match="beyond loopback"):
        tcp.connect_ex(ELSEWHERE)
    with socket.socket(type=socket.SOCK_DGRAM) as udp, pytest.raises(RuntimeError, match="beyond loopback"):
        udp.sendto(b"x", ELSEWHERE)


def test_names_are_not_looked_up() -> None:
    with pytest.raises(RuntimeError, match="beyond loopback"):
        socket.getaddrinfo("example.org", 443)
    with pytest.raises(RuntimeError, match="beyond loopback"):
        socket.create_connection(("example.org", 443), timeout=1)


def test_loopback_is_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            accepted, _ = server.accept()
            with accepted:
                client.sendall(b"x")
                assert accepted.recv(1) == b"x"
        assert socket.getaddrinfo("localhost", 80)


def test_unix_sockets_are_open(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "s"))
        server.listen(1)
        client.connect(str(tmp_path / "s"))


def test_models_are_never_downloaded_and_the_cache_is_not_the_users() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "attsvm-tests-" in os.environ["ATTSVM_CACHE"]
