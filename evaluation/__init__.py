"""What eval.py is made of, beside tasks/: completions, log-probabilities, scores."""
