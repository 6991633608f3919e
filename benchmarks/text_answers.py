"""One question to a text predictor of MiniLM's shape: ours beside ONNX Runtime and PyTorch, same weights.

    python -m benchmarks.text_answers --out FILE.json [--rounds 15] [--tiny]

From texts (a query and turns, 96 tokens in all, or a query of 16 alone) to a float32 vector, tokenizing
included, one question at a time. Weights and words are random, so nothing is downloaded. ONNX Runtime runs
the exported bundle; PyTorch is sentence-transformers where it is installed, else transformers, on one text of
the same tokens. Every contender has a process of its own and they take turns, 20 questions each.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import facts
from benchmarks.encoders import SHAPES, Shape, texts_of, write_folder
from benchmarks.training import measure, relative_to, show
from benchmarks.training_contenders import Made, Maker, Wait
from prime_jax.files import write_json

QUESTIONS = 20
TOKENS = {"conversation of 96 tokens": 96, "query of 16 tokens": 16}
PACKAGES = ("jax", "numpy", "onnxruntime", "torch", "transformers", "sentence-transformers")


class Place(NamedTuple):
    """What contenders answer with.

    Attributes:
        encoder: Folder of the encoder, as sentence-transformers reads it.
        bundle: Folder of the exported text predictor.
        tokens: Of a question with its turns.
    """

    encoder: Path
    bundle: Path
    tokens: int


def write_bundle(shape: Shape, folder: Path) -> Path:
    """Export an untrained text predictor of an encoder's folder."""
    import jax
    from flax import nnx

    from prime_jax.config import Config, DataConfig
    from prime_jax.export.bundle import write_bundle
    from prime_jax.models.text import TextConfig
    from prime_jax.pretrained.bert import BertTextEncoder
    from prime_jax.train.text_start import completed

    model = TextConfig(input_dim=shape.hidden, output_dim=shape.hidden)
    config = completed(Config(model=model, data=DataConfig(encoder=str(folder)))).model
    assert isinstance(config, TextConfig)
    built = config.build(rngs=nnx.Rngs(0))
    nnx.update(built.encoder, jax.tree.map(jax.numpy.asarray, BertTextEncoder(folder).params))
    bundle = folder.with_name("bundle")
    write_bundle(built, bundle, facts={"encoder": "random"}, source=folder)
    return bundle


def questions(tokens: int) -> list[tuple[list[str], str]]:
    """Turns and query; as many tokens in all, special ones included."""
    made = []
    for words in (text.split() for text in texts_of(tokens, QUESTIONS)):
        turns = [words[start : start + 19] for start in range(14, len(words), 20)] if tokens > 16 else []
        made.append(([" ".join(turn) for turn in reversed(turns)], " ".join(words[:14])))
    return made


def ours(place: Place, rows: int, wait: Wait) -> Made:
    """`predict_text` of the loaded bundle."""
    import prime_jax

    predictor = prime_jax.load(place.bundle)
    asked = questions(place.tokens)
    wait()

    def step() -> Any:
        return sum(float(predictor.predict_text(*one)[0]) for one in asked)

    return step, {}


def onnxruntime(place: Place, rows: int, wait: Wait) -> Made:
    """The bundle's model.onnx, with token ids as our tokenizer makes them."""
    from onnxruntime import InferenceSession

    from prime_jax.data.conversations import ConversationTokenizer
    from prime_jax.models.bundle import read_config
    from prime_jax.models.text import TextConfig

    config = read_config(place.bundle)
    assert isinstance(config, TextConfig)
    tokenizer = ConversationTokenizer.of_model(config, place.bundle / "tokenizer.json")
    session = InferenceSession(str(place.bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    asked = questions(place.tokens)
    wait()

    def answer(turns: list[str], query: str) -> float:
        ids = tokenizer([turns], [query]).tokens[None]
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        return float(session.run(["embedding"], given)[0][0, 0])

    return lambda: sum(answer(*one) for one in asked), {}


def pytorch(place: Place, rows: int, wait: Wait) -> Made:
    """The encoder on one text, as sentence-transformers or transformers runs it."""
    asked = [" ".join([query, *reversed(turns)]) for turns, query in questions(place.tokens)]
    try:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(place.encoder), device="cpu")
        wait()
        return lambda: sum(float(model.encode(text, normalize_embeddings=True)[0]) for text in asked), {}
    except ImportError:
        pass
    import torch
    from transformers import AutoModel, AutoTokenizer

    bert, tokenizer = AutoModel.from_pretrained(place.encoder), AutoTokenizer.from_pretrained(place.encoder)
    wait()

    @torch.inference_mode()
    def answer(text: str) -> float:
        given = tokenizer(text, return_tensors="pt", truncation=True, max_length=96)
        vector = bert(**given).last_hidden_state[0].mean(0)
        return float(torch.nn.functional.normalize(vector, dim=0)[0])

    return lambda: sum(map(answer, asked)), {}


CONTENDERS: dict[str, Maker] = {"prime-jax": ours, "ONNX Runtime": onnxruntime, "PyTorch": pytorch}


def main(argv: Sequence[str] | None = None) -> None:
    """Time every contender at every length and write what was found."""
    from benchmarks import text_answers  # contenders are found by name in processes of their own

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="one narrow layer, to try the command")
    given = parser.parse_args(argv)
    shape = Shape(1, 48, 4) if given.tiny else SHAPES["MiniLM"]
    found: dict[str, Any] = {"questions": QUESTIONS, **facts(*PACKAGES)}
    with tempfile.TemporaryDirectory() as scratch:
        encoder = write_folder(Path(scratch) / "encoder", shape, 512)
        bundle = write_bundle(shape, encoder)
        for name, tokens in TOKENS.items():
            place = text_answers.Place(encoder, bundle, tokens)
            results = measure(text_answers.CONTENDERS, place, QUESTIONS, given.rounds)
            found[name] = relative_to(results, "prime-jax")
            write_json(given.out, found)
            show(f"{name}, {QUESTIONS} questions", results)


if __name__ == "__main__":
    main()
