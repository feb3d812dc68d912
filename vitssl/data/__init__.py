"""Examples on the host: sources, decoding, transforms, batches. Never imports jax."""
