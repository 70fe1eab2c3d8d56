from __future__ import annotations

from pathlib import Path

import pytest

from serve.testing.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 8 query and 4 KV heads: legal at TP 1, 2 and 4."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(folder, num_heads=8, num_kv_heads=4, vocab_size=150)
