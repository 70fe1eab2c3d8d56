from __future__ import annotations

import pytest

pytest.importorskip("helm_python", reason="no Helm engine for this platform")
