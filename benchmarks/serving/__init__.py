"""Load for any OpenAI-compatible server: ``python -m benchmarks.serving``."""
