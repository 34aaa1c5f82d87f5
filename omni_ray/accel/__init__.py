"""What is done to the modules of a pipeline: how they are loaded, which kernels they use, how they are compiled."""
