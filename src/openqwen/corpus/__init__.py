"""Raw documents in, a clean, filtered, deduplicated, mixed corpus and its token shards out."""

from openqwen.corpus.build import build_corpus
from openqwen.corpus.config import CorpusConfig
from openqwen.corpus.shards import TokenShard, write_shards

__all__ = ["CorpusConfig", "TokenShard", "build_corpus", "write_shards"]
