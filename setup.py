"""Finds the packages on disk: callbacks/ and recipes/ stand at the top of the repository and ship in sparse_prune."""

from setuptools import find_packages, setup

mapped = find_packages(include=["callbacks", "callbacks.*", "recipes", "recipes.*"])
setup(packages=find_packages(include=["sparse_prune", "sparse_prune.*"]) + [f"sparse_prune.{name}" for name in mapped])
