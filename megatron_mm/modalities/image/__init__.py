"""Images: a ViT over a square of patches, one token a patch."""
