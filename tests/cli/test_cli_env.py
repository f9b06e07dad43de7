"""`eigenlorax env`: what a bug report needs."""

import importlib.metadata
import platform

import torch

import eigenlorax
from outcomes import assert_usage_error, json_of, succeeded


def test_has_the_versions_of_what_counts(cli):
    found = json_of(cli("env", "--json"))
    assert found["eigenlorax"] == eigenlorax.__version__
    assert found["python"] == platform.python_version()
    for package in ("torch", "numpy", "safetensors", "huggingface_hub", "typer", "rich", "peft"):
        assert found[package] == importlib.metadata.version(package)
    assert found["torch threads"] == str(torch.get_num_threads())
    assert all(isinstance(value, str) and value for value in found.values())


def test_the_table_has_the_same(cli):
    figures = json_of(cli("env", "--json"))
    rows = [line.split(maxsplit=1) for line in succeeded(cli("env")).out.splitlines() if line.strip()]
    assert ["torch", figures["torch"]] in [[word.strip() for word in row] for row in rows]
    assert len(rows) == len(figures)


def test_says_what_is_not_installed(cli, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert json_of(cli("env", "--json"))["diffusers"] == "not installed"


def test_shows_the_switches_of_the_hub_but_no_token(cli, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = succeeded(cli("env", "--json"))
    assert "https://hub.example" in done.out
    assert "secret" not in done.out


def test_takes_no_argument(cli):
    assert_usage_error(cli("env", "more"), "more")
