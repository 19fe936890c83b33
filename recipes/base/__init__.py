"""The base of all recipes: command line, module, data, dense twin, report."""
