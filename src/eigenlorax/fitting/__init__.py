"""Fit, refit and verify packs: by number of components, error bound or size."""
