"""The figures of a report need what the report needs."""

import pytest

pytest.importorskip("scipy", reason="SciPy is not installed: pip install '.[report]'")
