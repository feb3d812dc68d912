"""Arrays -> arrays, without parameters."""
