"""`python -m eigenlorax`: the same as the `eigenlorax` command."""

from .cli import main

if __name__ == "__main__":
    main()
