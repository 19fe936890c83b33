"""`python -m sparse_prune.recipes.causal_lm fit --config quickstart`."""

from sparse_prune.recipes.causal_lm.cli import main

if __name__ == "__main__":
    main()
