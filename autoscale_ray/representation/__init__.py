"""Graph-RAE: the scene-graph autoencoder whose embedding drives clusters and retrieval."""
