"""The mathematics of the method, and what every package uses: adapters in memory, names, options, safe files."""
