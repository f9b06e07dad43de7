"""The example of Ray Serve: started, asked over HTTP by many clients at once, checked and stopped. Skipped where Ray
Serve is not installed; scripts/ray-suite installs it and runs this."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install '.[ray-serve]'")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "serve_ray.py"


FAILING = """
import socket
from pathlib import Path

import ray
from ray import serve

import serve_ray

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
folder = Path.cwd()
serve_ray.make_tiny(folder)
tokenizer = serve_ray.AutoTokenizer.from_pretrained(folder / "model")
tokenizer.add_tokens("!")
tokenizer.save_pretrained(folder / "model")
ray.init(include_dashboard=False, object_store_memory=10**8, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(serve_ray.app({"model": str(folder / "model"), "pack": str(folder / "pack")}))
print(*serve_ray.ask(f"http://127.0.0.1:{port}/v1/completions", model="poet", prompt="to be!"))
serve.shutdown()
ray.shutdown()
"""
"""The same server for a model that has no row for one of its tokenizer's tokens, so that generating fails."""


def run(tmp_path, *words):
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join([str(EXAMPLE.parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_concurrent_requests_for_different_adapters_run_in_one_batch(tmp_path):
    done = run(tmp_path, EXAMPLE)
    assert "\n20 of 20 answers are what the adapter says alone\n" in done.stdout
    assert int(re.search(r"requests in the largest batch: (\d+)", done.stdout)[1]) > 1
    assert "\nan unknown name: 404, there is no model 'nobody'" in done.stdout
    assert "\na prompt of blanks: 422, the prompt '   ' has no tokens: send some text\n" in done.stdout


def test_an_error_while_generating_is_told(tmp_path):
    assert (
        "500 {'detail': 'the server failed: IndexError: index out of range in self'}"
        in run(tmp_path, "-c", FAILING).stdout
    )
