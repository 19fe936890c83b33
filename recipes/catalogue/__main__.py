"""`sparse-prune recipes`."""

from sparse_prune.recipes.catalogue.cli import main

if __name__ == "__main__":
    main()
