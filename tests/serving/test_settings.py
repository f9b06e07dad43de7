"""What the environment may ask of the plugin, and what is said of values that are none."""

from pathlib import Path

import pytest

from eigenlorax.errors import OptionError
from eigenlorax.serving.vllm.settings import Settings, read


def test_nothing_is_asked_for_by_an_environment_that_does_not_name_a_pack():
    assert read({}) is None
    assert read({"EIGENLORAX_PACK": "  ", "EIGENLORAX_CACHE": "/somewhere"}) is None


def test_a_pack_alone_is_served_expanded():
    assert read({"EIGENLORAX_PACK": "org/pack@v2"}) == Settings("org/pack@v2", shared_basis=False)


def test_everything_may_be_set():
    asked = {
        "EIGENLORAX_PACK": "/packs/one",
        "EIGENLORAX_SHARED_BASIS": "1",
        "EIGENLORAX_CACHE": "/fast",
        "EIGENLORAX_CACHE_BYTES": "8GB",
        "EIGENLORAX_SERVE_WITHIN": "0.15",
    }
    assert read(asked) == Settings("/packs/one", True, Path("/fast"), 8 * 10**9, 0.15)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("7", 7), ("500MB", 500 * 10**6), ("1.5 gb", 15 * 10**8), ("2GiB", 2**31), ("3k", 3000), ("12B", 12)],
)
def test_sizes_are_read_as_people_write_them(value, wanted):
    assert read({"EIGENLORAX_PACK": "p", "EIGENLORAX_CACHE_BYTES": value}).cache_bytes == wanted


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("EIGENLORAX_SHARED_BASIS", "true", "must be 1"),
        ("EIGENLORAX_SHARED_BASIS", "yes", "must be 1"),
        ("EIGENLORAX_CACHE_BYTES", "lots", "a number of bytes above 0"),
        ("EIGENLORAX_CACHE_BYTES", "-5", "a number of bytes above 0"),
        ("EIGENLORAX_CACHE_BYTES", "0GB", "a number of bytes above 0"),
        ("EIGENLORAX_CACHE_BYTES", "5 parsecs", "a number of bytes above 0"),
        ("EIGENLORAX_CACHE", "fast", "must be an absolute path"),
        ("EIGENLORAX_SERVE_WITHIN", "much", "must be a number above 0 and below 1"),
    ],
)
def test_an_error_names_the_variable_its_value_and_what_is_wanted(name, value, wanted):
    with pytest.raises(OptionError, match=wanted) as raised:
        read({"EIGENLORAX_PACK": "p", name: value})
    assert f"{name} is {value!r}" in str(raised.value)


def test_a_shared_basis_needs_a_pack():
    with pytest.raises(OptionError, match="set EIGENLORAX_PACK too"):
        read({"EIGENLORAX_SHARED_BASIS": "1"})
