"""Tests of PEFT's classes that are left out, each with its reason. None of them is about our tuner."""

FOREIGN: dict[str, str] = {}
