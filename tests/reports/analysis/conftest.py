"""The figures of a report need what the report needs."""

import pytest

for package in ("scipy", "sklearn"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[report]'")
