"""Collaborative annotation: a pool of instructions becomes D and P, by machines and people."""
