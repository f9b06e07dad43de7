"""Python as a user starts it, in a process of its own, without the seconds that importing takes each time.

One process imports what is heavy, once, and is forked for each call. Nothing of the tests is in it: no checks of types,
no filters of warnings.
"""

import atexit
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path

HEAVY = (
    "torch",
    "safetensors.torch",
    "transformers",
    "peft",
    "accelerate",
    "diffusers",
    "sklearn",
    "matplotlib.pyplot",
)
"""Imported where they are installed, and some of what they import late."""
LATE = (
    ("transformers", "AutoModelForSequenceClassification"),
    ("transformers", "AutoTokenizer"),
    ("transformers", "BertModel"),
    ("diffusers", "StableDiffusionPipeline"),
)
SECONDS = 300
"""After which a process is taken for one that hangs: far more than any takes on cores that are shared."""


def python(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """`python script.py …`, `python -m module …` or `python -c code …` to its end."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        asked = {
            "words": words,
            "cwd": str(cwd or Path.cwd()),
            "out": str(out),
            "err": str(err),
            "env": dict(os.environ),
        }
        code = _server()(asked)
        return subprocess.CompletedProcess(
            [sys.executable, *words], code, out.read_text("utf-8"), err.read_text("utf-8")
        )


@functools.cache
def _server():
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", text=True
    )
    atexit.register(process.kill)

    def ask(asked: dict) -> int:
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    return ask


def _serve() -> None:
    for name in HEAVY:
        with suppress(ImportError):
            import_module(name)
    for module, name in LATE:
        with suppress(ImportError):
            getattr(import_module(module), name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _become(asked: dict) -> None:
    """Run what was asked for, and end."""
    code = 1
    try:
        signal.alarm(SECONDS)
        for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, asked["out"], None), (2, asked["err"], None)):
            opened = os.open(path, flags if flags is not None else os.O_WRONLY | os.O_CREAT)
            os.dup2(opened, number)
        sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"])
        code = _run(asked["words"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(words: list[str]) -> int:
    """As the interpreter would; the exit code."""
    kind, *rest = words
    try:
        if kind == "-m":
            sys.argv, sys.path[0] = rest, os.getcwd()
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = words, str(Path(kind).parent)
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or 0
        sys.stderr.write(f"{left.code}\n")
        return 1
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    _serve()
