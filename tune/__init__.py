"""Search spaces, the papers' ablation suites and their tables, on Ray Tune."""
