"""The DiT engine: lanes run unmodified pipelines, the gate holds them, the loop owns the device."""
