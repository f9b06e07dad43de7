"""What the figures of a collection say: pure functions over factors and bases. No files, no words, no out × in matrix."""
