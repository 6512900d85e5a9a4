"""The families of audio encoders: audio.encoder names one of these files."""
