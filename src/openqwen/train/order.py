"""The order in which a stage sees its records."""

import numpy as np

from openqwen.support.generators import Generators


class Epochs:
    """Record numbers, shuffled for each epoch and cut into batches; `epochs` may be fractional."""

    def __init__(self, records: int, epochs: float, batch: int, generators: Generators):
        total = max(1, round(records * epochs))
        shuffle = generators["data.order"]
        epochs_of_numbers = [shuffle.permutation(records) for _ in range(-(-total // records))]
        self._order = np.concatenate(epochs_of_numbers)[:total]
        self._batch = batch
        self.steps = -(-total // batch)

    def batch(self, step: int) -> list[int]:
        """Record numbers of one step."""
        return [int(i) for i in self._order[step * self._batch : (step + 1) * self._batch]]
