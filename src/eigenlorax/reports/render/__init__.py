"""A report as Markdown and as one HTML page: Jinja2 templates, tables, and figures drawn by matplotlib."""
