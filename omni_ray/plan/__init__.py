"""Says before any load what a spec needs: ranks, nodes, GiB per rank, seconds per request. Imports no torch."""
