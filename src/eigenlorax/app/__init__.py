"""A web page for adapters: their report, a choice of a pack's error, and the pack as a download. Needs gradio."""
