"""Audio: Wav2Vec 2.0 over one-second chunks of 16 kHz audio, 49 tokens each."""
