"""The command that lists the recipes, copies one for editing, and runs one."""
