"""Layer and Block Trimming, the paper's baselines."""
