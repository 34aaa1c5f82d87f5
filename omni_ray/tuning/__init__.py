"""Finding the settings of a model: measured on this machine, with images to look at."""
