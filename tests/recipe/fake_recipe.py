"""A recipe of three stages in plain Python, milliseconds each; as a script it is `openqwen` with
this recipe inside.
"""

import sys

from openqwen import cli
from openqwen.recipe import graph

GRAPH = [
    ("corpus", "fake_corpus", {}),
    ("learn", "fake_learn", {"corpus": "corpus"}),
    ("online-score", "fake_score", {"model": "learn", "text": "corpus"}),
]

if __name__ == "__main__":
    graph.GRAPH = GRAPH
    sys.exit(cli.main())
