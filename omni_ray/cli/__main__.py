"""``python -m omni_ray.cli`` is ``omni-ray``."""

from omni_ray.cli import main

if __name__ == "__main__":
    main()
