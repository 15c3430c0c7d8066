"""`python -m benchmarks.soak`: a run that is disturbed for two hours."""
