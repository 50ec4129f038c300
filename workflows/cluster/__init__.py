"""The Ray session, placement of workers, checks of a cluster, GPU specifications."""
