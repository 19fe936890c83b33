"""`python -m sparse_prune.recipes.long_range fit --config quickstart`."""

from sparse_prune.recipes.long_range.cli import main

if __name__ == "__main__":
    main()
