"""Random hostile inputs for every reader: what is changed, what is read, and which limits hold while it is read."""
