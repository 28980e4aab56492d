"""Runs programs, and judges answers, apart from the process that scores."""
