"""The router: one actor that knows every group, queues DiT jobs, and sends each to the replica with the least work."""
