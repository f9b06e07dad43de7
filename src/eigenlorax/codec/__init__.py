"""The rate–distortion codec: quantised updates, their entropy-coded bytes, and storages."""
