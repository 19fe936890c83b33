"""`python -m sparse_prune.recipes.evaluate FOLDER`."""

from sparse_prune.recipes.evaluate.cli import main

if __name__ == "__main__":
    main()
