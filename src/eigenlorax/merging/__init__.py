"""The algebra of adapters: merge several into one, scale, subtract, interpolate, and take one out of another."""
