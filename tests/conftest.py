"""Shared fixtures: one thread, and the reference data folder where there is one."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

# threads that wait asleep: many times faster where the machine is shared (read when torch is imported)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# a test sees the records that it makes, and no committed ones beside them
os.environ["CRYOBENCH_SHIPPED"] = str(Path(__file__).parent / "no-shipped-records")

import pytest
import torch
from archive_server import Server


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Images this small are slower on two threads, and far slower beside other work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real structures and particles; tests that need it are skipped where it is absent."""
    root = Path(os.environ.get("CRYOBENCH_SHARED", Path(__file__).parents[2] / "shared"))
    if not (root / "data").is_dir():
        pytest.skip("the reference data are not on this machine")
    return root


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def waits() -> list[float]:
    return []
