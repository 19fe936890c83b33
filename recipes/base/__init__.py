"""What all fine-tuning recipes share: the command line with the dense twin, the module's optimizer, history, report."""
