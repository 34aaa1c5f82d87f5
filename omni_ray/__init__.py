"""Serves autoregressive models (vLLM) and diffusion transformers (diffusers) as one endpoint on Ray."""

__version__ = "0.1.0"
