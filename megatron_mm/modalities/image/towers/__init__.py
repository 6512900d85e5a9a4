"""The families of image encoders: image.encoder names one of these files."""
