"""What callers may pass as an option, and one line on everything else."""

import math

import numpy as np
import pytest

import eigenlorax as ex
from eigenlorax.core import options
from eigenlorax.core.fit_options import FitOptions
from eigenlorax.errors import AdapterNameError, OptionError
from planted import random_adapter, random_collection

HUGE = 10**400


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("2000000", 2 * 10**6),
        ("40MB", 40 * 10**6),
        ("40 mb", 40 * 10**6),
        ("500k", 500_000),
        ("1.5GiB", 3 * 2**29),
        ("3Ki", 3072),
        ("12B", 12),
        (" 0.001kB ", 1),
        # more digits than a float has
        ("9007199254740993", 2**53 + 1),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_sizes_are_read_as_people_write_them(text, wanted):
    assert options.parse_byte_count("--max-bytes", text) == wanted


@pytest.mark.parametrize(
    "text", ["", "lots", "-5", "0", "0.1", "1e6", "5i", "5 parsecs", "nan", "inf", "9000000TiB", "9" * 5000, "1,000"]
)
def test_a_text_that_is_no_size_is_said_in_one_line(text):
    with pytest.raises(OptionError, match="a number of bytes above 0 and below 2.*, as 8GB, 500MB or 2GiB") as raised:
        options.parse_byte_count("--max-bytes", text)
    assert f"--max-bytes is {text!r}"[:1000] in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [2_000_000, 2e6, np.int64(2_000_000), np.float64(2e6)])
def test_a_number_of_bytes_is_an_integer_or_a_float_that_is_one(value):
    found = options.to_byte_count("max_bytes", value)
    assert (found, type(found)) == (2_000_000, int)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "max_bytes is a number of bytes, at least 1, got 0."),
        (-3.0, "max_bytes is a number of bytes, at least 1, got -3."),
        (HUGE, "max_bytes is a number of bytes, below 2**63, got an integer of 1,329 bits."),
        # longer than Python is willing to print
        pytest.param(
            -(10**5000), "max_bytes is a number of bytes, at least 1, got an integer of 16,610 bits.", id="longest"
        ),
        (1e300, "max_bytes is a number of bytes, below 2**63, got 1e+300."),
        (1.5, "max_bytes must be an integer, got 1.5."),
        (math.nan, "max_bytes must be an integer, got nan."),
        (math.inf, "max_bytes must be an integer, got inf."),
        (True, "max_bytes must be an integer, got True."),
        ("40MB", "max_bytes must be an integer, got '40MB'."),
    ],
)
def test_what_is_no_number_of_bytes_is_said_in_one_line(value, message):
    with pytest.raises(OptionError, match="max_bytes") as raised:
        options.to_byte_count("max_bytes", value)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "ratio must be a number, got True."),
        ("9", "ratio must be a number, got '9'."),
        (None, "ratio must be a number, got None."),
        (HUGE, "ratio must be a number that a float can hold, got an integer of 1,329 bits."),
    ],
)
def test_what_is_no_number_is_said_in_one_line(value, message):
    with pytest.raises(OptionError, match="ratio") as raised:
        options.to_float("ratio", value)
    assert str(raised.value) == message


@pytest.mark.parametrize("name", ["max_error", "max_bytes", "ratio"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 0.0])
def test_a_fit_is_not_asked_for_what_no_pack_can_be(name, value):
    with pytest.raises(OptionError, match=rf"{name} .*got {value:g}"):
        FitOptions(**{name: value})


def test_a_fit_for_more_bytes_than_there_are_is_refused():
    with pytest.raises(OptionError, match="max_bytes is a number of bytes, below 2.*got an integer of 1,329 bits"):
        ex.fit(random_collection(2), max_bytes=HUGE)
    with pytest.raises(OptionError, match="and so does max_bytes=an integer of 1,329 bits"):
        ex.fit(random_collection(2), max_bytes=HUGE, n_components="auto")


@pytest.mark.parametrize(
    ("given", "known", "wanted"),
    [
        ("sst", ["cola", "sst2", "mr"], " Did you mean 'sst2'?"),
        ("SST2", ["cola", "sst2"], " Did you mean 'sst2'?"),
        ("sms_spam", ["sms-spam", "stance"], " Did you mean 'sms-spam'?"),
        ("v07", ["v006", "v007", "v097"], " Did you mean 'v007'?"),
        ("rel-01", ["rel-091", "rel-010", "rel-001"], " Did you mean 'rel-001'?"),
        ("0", ["00x", "sst2"], ""),
        ("nope", ["cola", "sst2"], ""),
        ("", ["cola"], ""),
        ("cola", [], ""),
        (None, ["delta"], ""),
    ],
)
def test_a_typo_gets_a_suggestion(given, known, wanted):
    assert options.suggestion(given, known) == wanted


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda pack: pack.packed("aplha"),
            AdapterNameError,
            "no adapter named 'aplha' in the pack. Did you mean 'alpha'",
        ),
        (lambda pack: pack.adapter("aplha"), AdapterNameError, "Did you mean 'alpha'"),
        (lambda pack: pack.remove("Beta"), AdapterNameError, "Did you mean 'beta'"),
        (lambda pack: pack.export("out", ["bet"]), AdapterNameError, "Did you mean 'beta'"),
        (lambda pack: pack.export("out", format="kohia"), OptionError, "'kohia' is not known. Did you mean 'kohya'"),
        (lambda pack: pack.export("out", dtype="flaot16"), OptionError, "got flaot16. Did you mean 'float16'"),
        (
            lambda pack: ex.fit({"alpha": pack.adapter("alpha")}, exclude_adapters="aplha"),
            AdapterNameError,
            "mean 'alpha'",
        ),
        (lambda pack: ex.fit([pack.adapter("alpha")], weighting="detla"), OptionError, "Did you mean 'delta'"),
        (lambda pack: ex.fit([pack.adapter("alpha")], solver="exakt"), OptionError, "Did you mean 'exact'"),
        (lambda pack: ex.fit([pack.adapter("alpha")], engine="process"), OptionError, "Did you mean 'processes'"),
        (lambda pack: ex.fit([pack.adapter("alpha")], dtype="int88"), OptionError, "Did you mean 'int8'"),
        (
            lambda pack: ex.fit([pack.adapter("alpha")], exclude_modules="qwery"),
            OptionError,
            r"'qwery' matches no module \(exclude_modules, --exclude-module\). Did you mean 'query'",
        ),
    ],
)
def test_a_typo_gets_a_suggestion_wherever_a_name_is_looked_up(call, error, match):
    pack = ex.fit([random_adapter("alpha", 1), random_adapter("beta", 2)])
    with pytest.raises(error, match=match):
        call(pack)
