"""Graph-RAE: the scene-graph autoencoder whose embedding drives clusters and retrieval."""

ENCODER_VERSION = 4
"""Rises with every change by which the same configuration, pools and seed give another embedding: encoders of other
versions are neither read nor found among finished stages."""
