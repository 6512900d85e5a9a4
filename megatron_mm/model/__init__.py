"""The multimodal decoder: encoders, embedding, transformer, loss."""
