"""Versions of one adapter as bytes: each is coded within an error bound, as a difference to earlier versions."""
