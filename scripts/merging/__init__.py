"""The methods of scripts/merge.py, one per file, and the model folders that they read and write."""
