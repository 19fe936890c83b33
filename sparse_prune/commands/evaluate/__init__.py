"""`sparse-prune evaluate`: measures a pruned model beside the dense one."""
