"""What the figures of a collection say: pure functions of factors and bases. No files, no words, no out × in matrix."""
