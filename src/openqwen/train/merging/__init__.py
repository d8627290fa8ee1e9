"""The Online Merging Optimizer: AdamW whose steps are merged with a task vector."""

from openqwen.train.merging.optimizer import OnlineMerging

__all__ = ["OnlineMerging"]
