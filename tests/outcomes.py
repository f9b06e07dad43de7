"""What a run of the command must, and must not, have done."""

import json
from pathlib import Path
from typing import Any

from children import Done


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Everything in a folder: bytes of files, targets of links, None for folders. Empty where there is no folder."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def assert_refused(done: Done, code: int, *parts: str | Path) -> None:
    """One message on stderr that has every one of the parts, nothing on stdout, no traceback, this exit code."""
    assert done.code == code, done
    assert done.out == ""
    assert "Traceback" not in done.err
    assert done.err.count("error: ") == 1, done.err
    message = done.err[done.err.index("error: ") :]
    assert message.count("\n") == 1, message
    for part in parts:
        assert str(part) in message


def assert_usage_error(done: Done, *parts: str) -> None:
    """What typer says of options that it cannot read."""
    assert done.code == 2, done
    assert done.out == ""
    assert "Usage: eigenlorax" in done.err
    assert "Traceback" not in done.err
    for part in parts:
        assert part in done.err


def succeeded(done: Done) -> Done:
    """The run itself, if it was one without an error."""
    assert done.code == 0, done
    assert "Traceback" not in done.err
    assert "error:" not in done.err
    return done


def json_of(done: Done) -> dict[str, Any]:
    """The document on stdout, which must be all that is there."""
    return json.loads(succeeded(done).out)
