"""Stage `corpus`: scan a source, drop duplicates, write shards."""
