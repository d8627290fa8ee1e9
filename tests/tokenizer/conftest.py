import os
from pathlib import Path
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


@pytest.fixture(scope="session")
def real_checkpoint():
    """Qwen2.5-Coder-0.5B-Instruct as GGUF: the published vocabulary and chat template."""
    default = Path.home() / ".cache" / "real-checkpoint" / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    path = Path(os.environ.get("OPENQWEN_REAL_CHECKPOINT", default))
    if not path.is_file():
        pytest.skip(
            f"the real checkpoint is not here: {path} (OPENQWEN_REAL_CHECKPOINT names another "
            "place)"
        )
    return path


@pytest.fixture(scope="session")
def real(real_checkpoint):
    from openqwen.tokenizer import load_tokenizer

    return load_tokenizer(real_checkpoint)


@pytest.fixture(scope="session")
def real_saved(real, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real-tokenizer")
    real.save(folder)
    return folder
