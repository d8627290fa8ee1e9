"""Data made without people: solved tasks, rejection sampling, preference pairs, repurposing."""
