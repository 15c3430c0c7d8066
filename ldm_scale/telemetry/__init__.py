"""What a run says while it works: log lines, TensorBoard and metrics.jsonl, images per second."""
