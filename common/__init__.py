"""What training, scoring and scripts share: configuration, rows, templates, run folders."""
