"""Hop 1: HTTP, as OpenAI defines it. Checks a request, finds its group, and words the answer."""
