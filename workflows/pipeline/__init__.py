"""What every stage shares: the stage runner, its lock, the shard pipeline and its timings."""
