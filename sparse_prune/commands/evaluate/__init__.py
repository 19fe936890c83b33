"""Evaluate a pruned model beside the dense one."""
