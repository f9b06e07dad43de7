"""Measurements of a collection: pure functions of factors and bases, without files, text, or out × in matrices."""
