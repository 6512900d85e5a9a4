"""From shards to micro-batches: packing, order, decoding, loading."""
