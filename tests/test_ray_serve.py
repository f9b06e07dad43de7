"""The example of Ray Serve: started, asked over HTTP by many clients at once, checked and stopped. Skipped where Ray
Serve is not installed; scripts/ray-suite installs it and runs this."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install '.[ray-serve]'")

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "serve_ray.py"


def test_concurrent_requests_for_different_adapters_run_in_one_batch(tmp_path):
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, EXAMPLE],
        cwd=tmp_path,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "\n20 of 20 answers are what the adapter says alone\n" in done.stdout
    assert int(re.search(r"requests in the largest batch: (\d+)", done.stdout)[1]) > 1
    assert "\nan unknown name: 404, there is no model 'nobody'" in done.stdout
