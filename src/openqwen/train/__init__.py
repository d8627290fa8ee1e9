"""Token shards, D, P → weights: one trainer, one file a stage."""
