"""To Hugging Face and back: exports, imports, pretrained encoders, and text from a trained model."""
