import os
from pydoc_data.topics import topics

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def real_texts():
    """The reference manual of Python that pydoc carries: 700 kB of English and code."""
    return [topics[name] for name in sorted(topics)]


@pytest.fixture(scope="session")
def trained(real_texts):
    from openqwen.tokenizer import TokenizerConfig, train_tokenizer

    return train_tokenizer(real_texts, TokenizerConfig(vocabulary=1500))


@pytest.fixture(scope="session")
def saved(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save(folder)
    return folder
