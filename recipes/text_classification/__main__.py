"""`python -m sparse_prune.recipes.text_classification fit --config quickstart`."""

from sparse_prune.recipes.text_classification.cli import main

if __name__ == "__main__":
    main()
