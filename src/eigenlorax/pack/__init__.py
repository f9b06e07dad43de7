"""A collection as one folder: its manifest, its subspace, its adapters as coefficients, and what is added later."""
