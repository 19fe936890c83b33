"""`python -m sparse_prune.recipes.vision fit --config quickstart`."""

from sparse_prune.recipes.vision.cli import main

if __name__ == "__main__":
    main()
