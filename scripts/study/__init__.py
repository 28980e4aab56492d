"""The study: bases, fine-tunings, their report."""
