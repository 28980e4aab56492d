"""What eval.py is made of, beside tasks/: runs of tasks, requests, completions and log-probabilities, scores."""
