"""`python -m sparse_prune.recipes.layers MODEL`."""

from sparse_prune.recipes.layers.cli import main

if __name__ == "__main__":
    main()
