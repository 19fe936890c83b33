"""`python -m sparse_prune.recipes.run_report RUN`."""

from sparse_prune.recipes.run_report.cli import main

if __name__ == "__main__":
    main()
