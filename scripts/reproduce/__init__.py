"""What the reproduction scripts share."""
