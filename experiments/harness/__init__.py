"""What `run.py` runs: jobs, their records, and the experiments themselves."""
