"""What else might make a text predictor better? Ideas tried in PyTorch before the library learns them.

    python -m benchmarks.text_levers --data DIR --out FILE.json [--split test|dev] [--seeds 0]
        [--only NAME ...]

Every row trains the query side of the memory's encoder as the row sentence_transformers_query of
`benchmarks.rivals` does (same text, loss, optimizer and number of epochs), with one thing changed, and is
compared with the row "as_it_is". The last epoch counts. A finished cell is in the file at once, and the same
command goes on from there. It needs the packages of `rivals_sentence_transformers.py`. Rows:

- three_vectors: three predicted vectors for a question (the pooled one, and it plus a linear map of it for
  each); a passage has the largest of its three scores;
- cloze: beside each two conversations a passage without a part of its words, which asks for that passage;
- dropped_turns: in three of ten conversations the oldest turns are left out in training;
- even_softmax: cross-entropy with equal shares for the right answers, which then compete with each other;
- both_inputs: the pooled vector plus a linear map, zero at first, of the frozen embeddings of the query, of
  the last turn and of the mean of the turns, trained together;
- rewrites: beside the loss five times the squared distance to the embedding of the question as people rewrote
  it (ConvDR, arXiv 2105.04166), for data whose rows have the key "rewrite";
- cross_encoder: the same encoder trained to judge a conversation and a passage together, on the 50 passages
  that the untrained text finds; it ranks the first 20 of the row as_it_is anew (no index can do that);
- distilled: as_it_is, and also close to what the cross-encoder says of those 50.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from transformers import AutoModel, AutoTokenizer

from benchmarks.common import facts
from benchmarks.rivals import CONFIGS, PACKAGES, chosen, conclusion, run_missing, show
from benchmarks.rivals_methods import FLOAT32, Cell, FineTuning, Method, Task, open_task
from prime_jax.config import read_config
from prime_jax.errors import DataError
from prime_jax.evaluate.arrays import mean_turn
from prime_jax.files import read_json, write_json
from prime_jax.locks import exclusive
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.progress import progress
from prime_jax.retrieval.metrics import DEPTH, mean_reciprocal_rank
from prime_jax.retrieval.vectors import unit

PLAIN = "as_it_is"
CANDIDATES, RERANKED, NEGATIVES = 50, 20, 7
LONGEST_PAIR = 160


class Lever(NamedTuple):
    """What one row changes.

    Attributes:
        vectors: How many are predicted for a question.
        cloze: Passages beside each conversation that ask for themselves, in the mean.
        dropped_turns: Share of the conversations that lose their oldest turns.
        even_softmax: Whether right answers compete with each other.
        both_inputs: Whether frozen embeddings are added.
        distilled: Weight of the cross-encoder's word.
        rewrites: Weight of the distance to the rewritten question's embedding.
    """

    vectors: int = 1
    cloze: float = 0.0
    dropped_turns: float = 0.0
    even_softmax: bool = False
    both_inputs: bool = False
    distilled: float = 0.0
    rewrites: float = 0.0


LEVERS = {
    PLAIN: Lever(),
    "three_vectors": Lever(vectors=3),
    "cloze": Lever(cloze=0.5),
    "dropped_turns": Lever(dropped_turns=0.3),
    "even_softmax": Lever(even_softmax=True),
    "both_inputs": Lever(both_inputs=True),
    "distilled": Lever(distilled=1.0),
    "rewrites": Lever(rewrites=5.0),
}


class Reader(torch.nn.Module):
    """The query side: texts to vectors `[B, K, E]`."""

    def __init__(self, task: Task, lever: Lever):
        super().__init__()
        folder = _folder(task)
        self.tokenizer, self.net = AutoTokenizer.from_pretrained(folder), _without_dropout(folder)
        width = task.encoder.dim
        if lever.vectors > 1:
            self.heads = torch.nn.Parameter(0.01 * torch.randn(lever.vectors, width, width))
        if lever.both_inputs:
            self.map = torch.nn.Linear(3 * width, width, bias=False)
            torch.nn.init.zeros_(self.map.weight)

    def forward(self, texts: Sequence[str], tokens: int, frozen: torch.Tensor | None) -> torch.Tensor:
        """Vectors of texts cut at so many tokens, with frozen embeddings where they are added."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=tokens, return_tensors="pt"
        )
        hidden, mask = self.net(**batch).last_hidden_state, batch["attention_mask"][..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        if hasattr(self, "map"):
            assert frozen is not None
            pooled = torch.nn.functional.normalize(pooled, dim=-1) + self.map(frozen)
        vectors = pooled[:, None]
        if hasattr(self, "heads"):
            vectors = vectors + torch.einsum("be,kef->bkf", pooled, self.heads)
        return torch.nn.functional.normalize(vectors, dim=-1)


def frozen_inputs(task: Task, split: str) -> torch.Tensor:
    """Embeddings of query, last turn and mean of the turns, side by side, `[Q, 3 E]`; zeros for no turn."""
    arrays = task.data.splits[split]
    newest = np.maximum(arrays.mask.sum(axis=1) - 1, 0)
    last = arrays.context[np.arange(len(newest)), newest] * np.any(arrays.mask, axis=1, keepdims=True)
    parts = [unit(arrays.query), last, mean_turn(arrays)]
    return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))


def best_scores(vectors: torch.Tensor, corpus: torch.Tensor) -> torch.Tensor:
    """The largest score of each passage, `[B, M]`."""
    return torch.einsum("bke,me->bkm", vectors, corpus).amax(1)


def train_reader(task: Task, lever: Lever, options: FineTuning, seed: int) -> tuple[Reader, float]:
    """Train one row; also the seconds that it took."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    reader, corpus = Reader(task, lever), _corpus(task)
    examples, positives = task.dataset.splits["train"], task.data.splits["train"].positives
    frozen = frozen_inputs(task, "train") if lever.both_inputs else None
    passages = [passage.text for passage in task.dataset.corpus]
    teacher = teaching(task, options, seed) if lever.distilled else None
    rewritten = rewritten_queries(task) if lever.rewrites else None
    started = time.perf_counter()
    steps = -(-len(examples) // options.batch_size) * options.epochs
    step = _stepper(reader, options, steps)
    with progress("training", len(examples) * options.epochs, "examples") as advance:
        for _ in range(options.epochs):
            order = rng.permutation(len(examples))
            for start in range(0, len(order), options.batch_size):
                rows = order[start : start + options.batch_size]
                texts, right = [], [positives[row] for row in rows]
                for row in rows:
                    turns = examples[row].context
                    if turns and rng.random() < lever.dropped_turns:
                        turns = turns[rng.integers(1, len(turns) + 1) :]
                    texts.append(task.conversation(replace(examples[row], context=turns)))
                for passage in rng.choice(len(passages), int(lever.cloze * len(rows)), replace=False):
                    words = passages[passage].split()
                    share = max(2, int(len(words) * rng.uniform(0.4, 0.8)))
                    left = np.sort(rng.permutation(len(words))[:share])
                    texts.append(task.source.query_prefix + " ".join(words[at] for at in left))
                    right.append(np.array([passage]))
                given = None if frozen is None else frozen[rows]
                vectors = reader(texts, options.tokens, given)
                scores = best_scores(vectors, corpus) / options.temperature
                loss = _loss(scores, right, lever.even_softmax)
                if teacher is not None:
                    candidates, said = teacher[0][rows], teacher[1][rows]
                    heard = torch.log_softmax(scores.gather(1, candidates), dim=1)
                    target = torch.softmax(said, dim=1)
                    loss = loss + lever.distilled * torch.nn.functional.kl_div(
                        heard, target, reduction="batchmean"
                    )
                if rewritten is not None:
                    apart = (vectors[: len(rows), 0] - rewritten[rows]) ** 2
                    loss = loss + lever.rewrites * apart.sum(dim=1).mean()
                step(loss)
                advance(len(rows))
    return reader.eval(), time.perf_counter() - started


def rewritten_queries(task: Task) -> torch.Tensor:
    """Embeddings of the questions of train as people rewrote them, `[n, E]`; as they are where nobody did."""
    texts = [str(one.extra.get("rewrite", one.query)) for one in task.dataset.splits["train"]]
    vectors = task.encoder.encode([task.source.query_prefix + text for text in texts])
    return torch.from_numpy(unit(vectors).astype(np.float32))


def _loss(scores: torch.Tensor, right: Sequence[ndarray], even: bool) -> torch.Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, answers in enumerate(right):
        mask[row, torch.from_numpy(np.asarray(answers))] = True
    if even:
        mean = scores.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)
        return (torch.logsumexp(scores, dim=1) - mean).mean()
    wrong = torch.logsumexp(scores.masked_fill(mask, -torch.inf), dim=1, keepdim=True)
    losses = (torch.logaddexp(scores, wrong) - scores).masked_fill(~mask, 0.0)
    return (losses.sum(dim=1) / mask.sum(dim=1)).mean()


def _stepper(model: torch.nn.Module, options: FineTuning, steps: int) -> Any:
    """AdamW with warm-up and cosine; weight decay on matrices of the encoder alone."""
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim > 1 and name.startswith("net")]
    others = [weight for name, weight in named if not (weight.ndim > 1 and name.startswith("net"))]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    )
    done = 0

    def step(loss: torch.Tensor) -> None:
        nonlocal done
        rate = min(1.0, (done + 1) / max(1.0, options.warmup * steps))
        rate *= 0.5 * (1 + math.cos(math.pi * done / steps))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done += 1

    return step


def rankings(task: Task, reader: Reader, options: FineTuning, split: str, depth: int) -> ndarray:
    """Corpus rows of each query of a split, best first, `[Q, depth]`; nothing is left out."""
    texts, corpus = task.conversations(split), _corpus(task)
    frozen = frozen_inputs(task, split) if hasattr(reader, "map") else None
    parts = []
    with torch.no_grad():
        for start in range(0, len(texts), 64):
            given = None if frozen is None else frozen[start : start + 64]
            vectors = reader(texts[start : start + 64], options.tokens, given)
            parts.append(best_scores(vectors, corpus).topk(depth).indices.numpy())
    return np.concatenate(parts)


def run_lever(task: Task, lever: Lever, options: FineTuning, seed: int) -> Cell:
    """The cell of one row."""
    reader, seconds = train_reader(task, lever, options, seed)
    on_dev = rankings(task, reader, options, "dev", DEPTH)
    size = FLOAT32 * sum(weight.numel() for weight in reader.parameters()) / 1e6
    about = {"dev_MRR@10": _mrr(on_dev, task)}
    return Cell(rankings(task, reader, options, task.split, DEPTH), seconds, False, None, None, size, about)


class CrossEncoder(torch.nn.Module):
    """The cross-encoder: scores of pairs of a conversation and a passage, `[B]`."""

    def __init__(self, task: Task):
        super().__init__()
        folder = _folder(task)
        self.tokenizer, self.net = AutoTokenizer.from_pretrained(folder), _without_dropout(folder)
        self.score = torch.nn.Linear(task.encoder.dim, 1)

    def forward(self, conversations: Sequence[str], passages: Sequence[str]) -> torch.Tensor:
        """Scores of the pairs; a conversation loses its oldest words where a pair is too long."""
        batch = self.tokenizer(
            list(conversations),
            list(passages),
            padding=True,
            truncation="only_first",
            max_length=LONGEST_PAIR,
            return_tensors="pt",
        )
        hidden, mask = self.net(**batch).last_hidden_state, batch["attention_mask"][..., None]
        scores: torch.Tensor = self.score((hidden * mask).sum(1) / mask.sum(1))[:, 0]
        return scores


def candidates_of(task: Task, split: str) -> ndarray:
    """What the untrained encoder finds with the conversation's text, `[Q, CANDIDATES]`."""
    vectors = task.encoder.encode(task.conversations(split))
    corpus = task.data.corpus.embeddings[:]
    return np.argsort(-vectors @ unit(corpus).T, axis=1)[:, :CANDIDATES]


def train_cross_encoder(task: Task, options: FineTuning, seed: int) -> CrossEncoder:
    """Train the cross-encoder: a right answer among wrong candidates, softmax over the eight."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model, texts = CrossEncoder(task), task.conversations("train")
    passages = [task.source.passage_prefix + passage.text for passage in task.dataset.corpus]
    found, positives = candidates_of(task, "train"), task.data.splits["train"].positives
    rows_of_step, epochs = 8, 2
    step = _stepper(model, options._replace(learning_rate=1e-4), -(-len(texts) // rows_of_step) * epochs)
    with progress("cross-encoder", len(texts) * epochs, "examples") as advance:
        for _ in range(epochs):
            order = rng.permutation(len(texts))
            for start in range(0, len(order), rows_of_step):
                rows = order[start : start + rows_of_step]
                pairs: list[tuple[str, str]] = []
                for row in rows:
                    wrong = rng.permutation(np.setdiff1d(found[row], positives[row]))[:NEGATIVES]
                    shown = [rng.choice(positives[row]), *wrong]
                    pairs += [(texts[row], passages[passage]) for passage in shown]
                scores = model(*zip(*pairs, strict=True)).reshape(len(rows), NEGATIVES + 1)
                first = torch.zeros(len(rows), dtype=torch.long)
                step(torch.nn.functional.cross_entropy(scores, first))
                advance(len(rows))
    return model.eval()


def cross_scores(task: Task, model: CrossEncoder, split: str, rows: ndarray) -> torch.Tensor:
    """The cross-encoder's scores of some passages for each query of a split, `[Q, k]`."""
    texts = task.conversations(split)
    passages = [task.source.passage_prefix + passage.text for passage in task.dataset.corpus]
    scores = []
    with torch.no_grad(), progress("cross-encoder, scores", len(texts), "conversations") as advance:
        for text, shown in zip(texts, rows, strict=True):
            scores.append(model([text] * len(shown), [passages[passage] for passage in shown]))
            advance(1)
    return torch.stack(scores)


def teaching(task: Task, options: FineTuning, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of each training example, and what the cross-encoder says of them."""
    rows = candidates_of(task, "train")
    return torch.from_numpy(rows), cross_scores(task, train_cross_encoder(task, options, seed), "train", rows)


def run_cross_encoder(task: Task, options: FineTuning, seed: int) -> Cell:
    """The first passages of the plain row, ranked anew by the cross-encoder."""
    started = time.perf_counter()
    reader, _ = train_reader(task, LEVERS[PLAIN], options, seed)
    model = train_cross_encoder(task, options, seed)
    seconds = time.perf_counter() - started

    def ranked(split: str) -> ndarray:
        first = rankings(task, reader, options, split, RERANKED)
        order = cross_scores(task, model, split, first).argsort(dim=1, descending=True).numpy()
        return np.take_along_axis(first, order, axis=1)[:, :DEPTH]

    about = {"dev_MRR@10": _mrr(ranked("dev"), task)}
    return Cell(ranked(task.split), seconds, False, None, None, None, about)


def check(task: Task) -> None:
    """Refuse what these rows would get wrong without a word.

    Raises:
        DataError: If the data has exclusions or scopes, or the encoder is code or does not take means.
    """
    if not isinstance(task.encoder, BertTextEncoder) or task.encoder.pooling != "mean":
        raise DataError(f"{task.encoder.identity}: these rows train a model folder whose pooling is the mean")
    for name in ("dev", task.split):
        split = task.data.splits[name]
        excluded = split.exclude is not None and any(map(len, split.exclude))
        if excluded or (split.scope is not None and np.any(split.scope >= 0)):
            raise DataError(f"{name}: has exclusions or scopes, and these rows search everything")


def _mrr(found: ndarray, task: Task) -> float:
    return float(mean_reciprocal_rank(found[None], task.data.splits["dev"].positives)[0])


def _corpus(task: Task) -> torch.Tensor:
    return torch.from_numpy(unit(task.data.corpus.embeddings[:]).astype(np.float32))


def _folder(task: Task) -> str:
    encoder: Any = task.encoder
    return str(encoder.source.transformer)


def _without_dropout(folder: str) -> Any:
    net = AutoModel.from_pretrained(folder)
    for part in net.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return net


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the file yet, and print the table of all that it holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--split", choices=("test", "dev"), default="test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=FineTuning().epochs)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows to run")
    given, words = parser.parse_known_args(argv)
    config = read_config(CONFIGS / "text.yaml", [f"--data.path={given.data}", *words])
    task, options = open_task(config, given.split), FineTuning(epochs=given.epochs)
    check(task)
    rewritten = any("rewrite" in example.extra for example in task.dataset.splits["train"])
    no_rewrites = None if rewritten else "no example of train has a 'rewrite'"
    methods = [
        Method(
            name,
            partial(run_lever, task, lever, options),
            {**options._asdict(), **lever._asdict()},
            seeded=True,
            ours=name != PLAIN,
            lacking=no_rewrites if lever.rewrites else None,
        )
        for name, lever in LEVERS.items()
    ]
    settings = {**options._asdict(), "candidates": CANDIDATES, "reranked": RERANKED}
    run = partial(run_cross_encoder, task, options)
    methods.append(Method("cross_encoder", run, settings, seeded=True, ours=True))
    with exclusive(given.out, "a table", lock=given.out.with_name(f".{given.out.name}.lock")):
        same = {"set": given.data.resolve().name, "data_hash": task.data.hash, "split": given.split}
        result: dict[str, Any] = read_json(given.out) if given.out.exists() else {"made_of": same}
        if result["made_of"] != same:
            raise DataError(f"{given.out}: holds a table of other data; choose another --out")
        run_missing(chosen(methods, given.only), given.seeds, result, given.out)
        result |= conclusion(result["cells"], task.data, [method.name for method in methods])
        write_json(given.out, {**result, **facts(*PACKAGES)})
    show(result)


if __name__ == "__main__":
    main()
