"""Errors and warnings as texts, in Python and on the command line: however much they quote, they keep what to do."""

import inspect
import pickle
import warnings

import pytest

from adapters import change_config, make_adapter
from eigenlorax import errors
from outcomes import assert_refused

LONG = f"adapters/one: the field is {'x' * 10**6}. Remove it."
ALL = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, Exception | Warning)]


@pytest.mark.parametrize("kind", ALL)
def test_a_long_message_keeps_its_beginning_and_its_end(kind):
    message = str(kind(LONG))
    assert message.startswith("adapters/one: the field is xxx")
    assert message.endswith("xxx. Remove it.")
    assert f" … ({len(LONG) - 3000:,} characters left out) … " in message
    assert len(message) < 3100


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("message", ["", "short", "y" * 3000])
def test_any_other_message_is_what_it_is(kind, message):
    assert str(kind(message)) == message
    assert str(pickle.loads(pickle.dumps(kind(message)))) == message


def test_a_message_about_a_message_is_short_too():
    message = str(errors.FormatError(f"{errors.FormatError(LONG)} To leave it out: --skip-bad."))
    assert len(message) < 3100
    assert message.endswith("Remove it. To leave it out: --skip-bad.")


def test_the_command_prints_no_more(cli, tmp_path):
    folder = change_config(make_adapter(tmp_path / "one", seed=1), peft_type="A" * 10**6)
    done = cli("inspect", folder)
    assert_refused(done, 3, folder, "only LORA and ADALORA adapters are supported")
    assert len(done.err) < 3200


def test_nor_does_a_warning_of_a_library(cli, tmp_path, monkeypatch):
    from eigenlorax.cli import env

    monkeypatch.setattr(env, "collect", lambda: warnings.warn(LONG, stacklevel=1) or {})
    assert len(cli("env").err) < 3200
