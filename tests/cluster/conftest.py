"""Requirements of tests of several hosts on this machine."""

from __future__ import annotations

import namespaces
import pytest


@pytest.fixture(scope="session")
def network_namespaces() -> None:
    """The right to make hosts of network namespaces. Where it is missing the test skips aloud."""
    if (reason := namespaces.reason_against()) is not None:
        pytest.skip(reason)
