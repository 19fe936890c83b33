"""`python -m sparse_prune.recipes.dashboard ENTITY/PROJECT`."""

from sparse_prune.recipes.dashboard.cli import main

if __name__ == "__main__":
    main()
