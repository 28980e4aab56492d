"""The quickstart's data and report."""
