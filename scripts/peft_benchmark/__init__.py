"""Helpers of scripts/peft_benchmark.sh."""
