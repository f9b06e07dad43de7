"""The rate–distortion codec: updates as integers of a quantisation step size, their bytes, and their storages."""
