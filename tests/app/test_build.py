from __future__ import annotations

import pytest

from serve.app import build_model
from serve.errors import ConfigurationError


def test_hardware_that_cannot_be_computed_on_is_refused_when_deployed() -> None:
    args = {"model": {"name": "m", "path": "/models/m"}, "hardware": {"device": "cuda"}}
    with pytest.raises(ConfigurationError, match=r"hardware\.device must be cpu, got cuda"):
        build_model(args)
