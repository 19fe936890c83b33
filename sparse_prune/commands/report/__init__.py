"""`sparse-prune report`: shows a run, or several, as one HTML page that needs no network."""
