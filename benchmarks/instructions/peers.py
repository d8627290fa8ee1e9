"""What scikit-learn's DBSCAN and mlxtend's FP-Growth find: the expected values of our tests.

    python -m venv peers && peers/bin/pip install scikit-learn mlxtend
    peers/bin/python benchmarks/instructions/peers.py > tests/instruct/mining_peers.json

tests/instruct/test_collaborate_mining.py draws the same vectors and transactions.
"""

import json
import sys

import numpy as np


def vectors(seed: int, count: int, width: int) -> np.ndarray:
    """Unit vectors around a few centres."""
    rng = np.random.Generator(np.random.PCG64(seed))
    centres = rng.normal(size=(5, width))
    found = centres[rng.integers(5, size=count)] + 0.35 * rng.normal(size=(count, width))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def transactions(seed: int, count: int) -> list[list[str]]:
    """Items a to h; some come together."""
    rng = np.random.Generator(np.random.PCG64(seed))
    found = []
    for _ in range(count):
        items = {"abcdefgh"[n] for n in rng.integers(8, size=4)}
        found.append(sorted(items | ({"b"} if "a" in items and rng.random() < 0.95 else set())))
    return found


def main() -> None:
    """Write the peers' results to standard output."""
    import mlxtend
    import pandas
    import sklearn
    from mlxtend.frequent_patterns import association_rules, fpgrowth
    from sklearn.cluster import DBSCAN

    clusters = []
    for seed, count, width, distance, neighbours in (
        (1, 80, 4, 0.02, 1),
        (2, 80, 4, 0.02, 3),
        (3, 120, 6, 0.05, 5),
        (4, 120, 3, 0.005, 4),
    ):
        model = DBSCAN(eps=distance, min_samples=neighbours, metric="cosine")
        labels = model.fit_predict(vectors(seed, count, width)).tolist()
        case = {"seed": seed, "count": count, "width": width, "distance": distance}
        clusters.append(case | {"neighbours": neighbours, "labels": labels})
    sets = []
    for seed, count, support, longest in ((1, 60, 6, 2), (2, 60, 4, 4), (3, 200, 20, 3)):
        rows = [{item: item in some for item in "abcdefgh"} for some in transactions(seed, count)]
        table = fpgrowth(
            pandas.DataFrame(rows), support / count, use_colnames=True, max_len=longest
        )
        found = {
            "".join(sorted(s)): round(x * count) for s, x in zip(table.itemsets, table.support)
        }
        rules = association_rules(table, metric="confidence", min_threshold=0.8)
        told = [
            ["".join(sorted(given)), "".join(then), round(confidence, 9)]
            for given, then, confidence in zip(
                rules.antecedents, rules.consequents, rules.confidence
            )
            if len(then) == 1
        ]
        case = {"seed": seed, "count": count, "support": support, "longest": longest}
        sets.append(case | {"sets": dict(sorted(found.items())), "rules": sorted(told)})
    peers = {"scikit-learn": sklearn.__version__, "mlxtend": mlxtend.__version__}
    json.dump({"peers": peers, "clusters": clusters, "sets": sets}, sys.stdout)


if __name__ == "__main__":
    main()
