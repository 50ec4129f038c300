"""Stage `features`: patch features of the frozen encoder, as shards."""
