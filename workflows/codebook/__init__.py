"""Stage `codebook`: two-level k-means over feature shards."""
