"""The storages: how a pack's files hold components and coefficients. `table` lists them by name."""
