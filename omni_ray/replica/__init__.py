"""Replica groups: one Serve deployment per group, one replica per gang of ranks."""
