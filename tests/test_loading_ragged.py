from __future__ import annotations
import numpy as np, pytest
from gateway.core.tensor import DATATYPE
from tests import test_catalog
from tests.live import models
from tests.test_catalog import Rig
from tests.test_loading import ask
runner, pool, rig = test_catalog.runner, test_catalog.pool, test_catalog.rig

def test_a(rig: Rig) -> None:
    version = rig.one(models.segments(), models.SEGMENTS_CONFIG)
    print(version.spec)
    print(ask(rig, version, np.arange(5.0).reshape(1, 5)))
    assert 0
