"""The texts of a run whose encoders are trained: tokenised once, embedded anew for every validation."""

import tempfile
from pathlib import Path

from prime_jax.config import Config
from prime_jax.data.embedded import EmbeddedDataset, embed_dataset
from prime_jax.data.encode import encode_texts, passage_prefix_for
from prime_jax.data.prepare import dataset_texts
from prime_jax.data.records import Dataset
from prime_jax.data.store import EmbeddingStore
from prime_jax.data.tokens import TokenTable
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.pretrained.pair import PairedEncoder, load_pair, write_pair
from prime_jax.train.encoders import pair_of
from prime_jax.train.sharding import everywhere, make_mesh
from prime_jax.train.state import TrainState


class TrainedTexts:
    """What a run needs of its texts besides the embeddings it started with.

    Args:
        config: Of the run.
        dataset: The texts.
        encoder: That training starts from.
        store: Embeddings by that encoder; batches name texts by their rows in it.

    Attributes:
        encoder: As given.
        tokens: Token ids of every text.
    """

    def __init__(self, config: Config, dataset: Dataset, encoder: BertTextEncoder, store: EmbeddingStore):
        self.encoder = encoder
        self._mesh = make_mesh(config.mesh, config.train.batch_size, config.train.micro_batch_size)
        self._config, self._dataset = config, dataset
        texts = dataset_texts(
            dataset, query_prefix=config.data.query_prefix, passage_prefix=config.data.passage_prefix
        )
        self.tokens = TokenTable(store, texts, encoder.tokenize)
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def embedded(self, state: TrainState) -> EmbeddedDataset:
        """The whole dataset as the encoders of a state embed it now; what was embedded before is dropped."""
        pair, source = self._pair(state), self._config.data
        passage_prefix = passage_prefix_for(pair, source.passage_prefix)
        if self._folder is not None:
            self._folder.cleanup()
        self._folder = tempfile.TemporaryDirectory(prefix="prime-jax-encoded-")
        store = EmbeddingStore.open(Path(self._folder.name), pair.identity, pair.dim)
        texts = dataset_texts(self._dataset, query_prefix=source.query_prefix, passage_prefix=passage_prefix)
        encode_texts(texts, pair, store, title="encoding anew")
        return embed_dataset(
            self._dataset,
            store,
            max_context_length=self._config.model.max_context_length,
            query_prefix=source.query_prefix,
            passage_prefix=passage_prefix,
        )

    def write(self, state: TrainState, folder: Path) -> PairedEncoder:
        """Write both encoders of a state to `folder` and read them back, as whoever uses them will."""
        write_pair(self._pair(state), folder)
        return load_pair(folder)

    def _pair(self, state: TrainState) -> PairedEncoder:
        """The encoders of a state, in every process."""
        return pair_of(self.encoder, everywhere(state.encoders, self._mesh), int(state.step))
