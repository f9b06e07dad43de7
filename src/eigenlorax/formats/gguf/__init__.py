"""Adapters in llama.cpp's file format, GGUF: read and written, with the names and the row order of the base model."""
