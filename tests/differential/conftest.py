"""Both servers, started once for everything in this package."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.differential.campaign import both
from tests.differential.triton_process import TritonProcess
from tests.live.gateway_process import GatewayProcess


@pytest.fixture(scope="package")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TritonProcess, GatewayProcess]]:
    with both(tmp_path_factory.mktemp("differential")) as pair:
        yield pair
