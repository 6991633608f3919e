"""What is pretraining worth? Llama layers that start pretrained, and encoders that are trained along.

    python -m benchmarks.pretrained blocks --data DIR --out FILE.json --work DIR
    python -m benchmarks.pretrained encoders --data DIR --out FILE.json --work DIR

`blocks`: a small Llama is trained here as a language model, on the texts of the train split alone; then a
predictor with such layers starts from them or at random. `encoders`: X and Y start as the first layers of
MiniLM, on a part of the data; Y stays frozen, learns slowly, or follows X. Every figure is that of dev after
the last epoch, so that nothing is chosen on it. Rows are added one by one; a variant that is there is not run
again. `--work` keeps the language model and the smaller data between calls.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import facts
from prime_jax.config import read_config
from prime_jax.data.encode import load_encoder
from prime_jax.data.records import Dataset, load_dataset, write_dataset
from prime_jax.files import read_json, write_json
from prime_jax.pretrained.bert import BertTextEncoder
from prime_jax.train import checkpoints
from prime_jax.train.loop import train

CONFIG = Path(__file__).parents[1] / "configs" / "chat.yaml"  # trained encoders read no corpus of embeddings
SEEDS = (0, 1, 2)
T_95 = 4.303  # Student's t of two degrees of freedom
METRICS = ("P@5", "R@10", "MRR@10", "nDCG@10")

LLAMA = {
    "hidden-dim": 256,
    "num-layers": 2,
    "num-heads": 4,
    "num-kv-heads": 2,
    "head-dim": 64,
    "mlp-dim": 512,
}
LM_STEPS, LM_ROWS, LM_TOKENS = 400, 16, 64
BLOCKS: Mapping[str, list[str]] = {
    "random": [],
    "pretrained": ["INIT"],
    "pretrained, layers at 0.1 of the rate": ["INIT", "--train.layers-lr-multiplier=0.1"],
    "pretrained, layers frozen": ["INIT", "--train.layers-lr-multiplier=0"],
    "random, layers frozen": ["--train.layers-lr-multiplier=0"],
}
BERT_LAYERS, BERT_TOKENS = 2, 32
ENCODERS: Mapping[str, list[str]] = {
    "both frozen": [],
    "X trained, Y frozen": ["--train.x-encoder=trained"],
    "X trained, Y slow": ["--train.x-encoder=trained", "--train.y-encoder=slow"],
    "X trained, Y its average": ["--train.x-encoder=trained", "--train.y-encoder=ema"],
}
TRAINED_ON, JUDGED_ON = 1200, 600  # pairs of an example and a right answer, of the smaller data


def language_model(data: Path, folder: Path) -> dict[str, Any]:
    """Train a small Llama to continue the texts of the train split (once)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    told = folder / "told.json"
    if told.exists():
        return dict(read_json(told))
    encoder = load_encoder("minilm")
    assert isinstance(encoder, BertTextEncoder)
    examples = load_dataset(data, ("train",)).splits["train"]
    texts = list(dict.fromkeys(text for example in examples for text in (*example.context, example.query)))
    ids = [token for row in encoder.tokenize(texts) for token in row.tolist()]
    used = sorted(set(ids))  # a vocabulary of what occurs keeps the softmax small
    number = {token: place for place, token in enumerate(used)}
    stream = torch.tensor([number[token] for token in ids])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(used), intermediate_size=512, head_dim=64, rms_norm_eps=1e-5, **sizes)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    losses, started = [], time.perf_counter()
    for step in range(LM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 20) * (1 - step / LM_STEPS)
        at = torch.randint(0, len(stream) - LM_TOKENS, (LM_ROWS,))
        batch = torch.stack([stream[place : place + LM_TOKENS] for place in at.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.model.save_pretrained(folder)
    found = {
        "steps": LM_STEPS,
        "tokens": LM_STEPS * LM_ROWS * LM_TOKENS,
        "vocabulary": len(used),
        "first_loss": losses[0],
        "last_loss": statistics.mean(losses[-20:]),
        "seconds": round(time.perf_counter() - started),
    }
    write_json(told, found)
    return found


def smaller(data: Path, folder: Path) -> Path:
    """Some examples of train and dev, with the passages they name and as many others; made once."""
    if not (folder / "corpus.jsonl").exists():
        whole, drawn = load_dataset(data, ("train", "dev")), random.Random(0)
        splits = {}
        for name, most in (("train", TRAINED_ON), ("dev", JUDGED_ON)):
            order, chosen, pairs = list(range(len(whole.splits[name]))), [], 0
            drawn.shuffle(order)
            while pairs < most and order:
                chosen.append(order.pop())
                pairs += len(whole.splits[name][chosen[-1]].positives)
            splits[name] = tuple(whole.splits[name][row] for row in sorted(chosen))
        named = {
            name
            for rows in splits.values()
            for row in rows
            for name in (*row.positives, *row.negatives, *row.exclude)
        }
        others = [passage.id for passage in whole.corpus if passage.id not in named]
        named |= set(drawn.sample(others, min(len(others), len(named))))
        corpus = tuple(passage for passage in whole.corpus if passage.id in named)
        write_dataset(folder, Dataset(corpus, splits))
    return folder


def shortened_minilm(folder: Path) -> Path:
    """MiniLM's first layers as a folder of its own; made once."""
    from safetensors.numpy import load_file, save_file

    if (folder / "model.safetensors").exists():
        return folder
    encoder = load_encoder("minilm")
    assert isinstance(encoder, BertTextEncoder)
    source = encoder.source.transformer
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    fields = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": BERT_LAYERS}
    write_json(folder / "config.json", fields)
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": BERT_TOKENS, "do_lower_case": False})
    tensors = load_file(source / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if ".layer." not in name or int(name.split(".layer.")[1].split(".")[0]) < BERT_LAYERS
    }
    save_file(kept, folder / "model.safetensors")
    return folder


def one_run(words: Sequence[str]) -> dict[str, Any]:
    """Train once; dev's figures after the last epoch."""
    config, started = read_config(CONFIG, words), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if train(config, Path(folder) / "run").interrupted:
            sys.exit("stopped; go on with the same command")
        newest = checkpoints.latest(Path(folder) / "run")
        assert newest is not None
        metrics = newest.facts["metrics"]
    figures = {name: metrics[name] for name in metrics if name.removeprefix("unseen ") in METRICS}
    return {"seed": config.train.seed, "seconds": round(time.perf_counter() - started), **figures}


def summary(runs: Sequence[Mapping[str, float]], first: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means over seeds, and the difference to the first variant, seed by seed, with its 95% interval."""
    names = [name for name in runs[0] if name not in ("seed", "seconds")]
    mean = {name: statistics.mean(run[name] for run in runs) for name in names}
    apart = [run["MRR@10"] - other["MRR@10"] for run, other in zip(runs, first, strict=True)]
    room = T_95 * statistics.stdev(apart) / len(apart) ** 0.5
    middle = statistics.mean(apart)
    return {
        "mean": mean,
        "stdev": {name: statistics.stdev(run[name] for run in runs) for name in names},
        "MRR@10 to the first": {"difference": middle, "interval": [middle - room, middle + room]},
        "seeds": list(runs),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the file yet, and print one line for each variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("blocks", "encoders"))
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    given = parser.parse_args(argv)
    result: dict[str, Any] = read_json(given.out) if given.out.exists() else {}
    name = given.data.name
    if given.part == "blocks":
        folder = given.work / f"llama-{name}"
        result["language_model"] = language_model(given.data, folder)
        settings = ["--model.block=llama", *(f"--model.{key}={size}" for key, size in LLAMA.items())]
        settings += ["--model.max-context-length=4", "--train.num-epochs=3", "--train.eval-every-epochs=3"]
        start = f'--model.init-from={{"path": "{folder}", "layers": [0, 2]}}'
        variants, data, told = BLOCKS, given.data, list(settings)
    else:
        data, start = smaller(given.data, given.work / name), ""
        settings = ["--model.max-context-length=1", "--train.batch-size=32", "--train.num-epochs=3"]
        settings += ["--train.eval-every-epochs=3", "--train.learning-rate=5e-4"]
        told = [*settings, f"--data.encoder=first {BERT_LAYERS} layers of MiniLM, {BERT_TOKENS} tokens"]
        settings.append(f"--data.encoder={shortened_minilm(given.work / 'minilm')}")
        variants = ENCODERS
    dataset = load_dataset(data, ("train", "dev"))
    result |= {
        "part": given.part,
        "set": name,
        "data_hash": dataset.hash,
        "queries": {split: len(rows) for split, rows in dataset.splits.items()},
        "passages": len(dataset.corpus),
        "config": CONFIG.name,
        "settings": told,
        **facts("jax", "flax", "optax", "transformers", "torch"),
    }
    done = result.setdefault("variants", {})
    for variant, words in variants.items():
        if variant in done:
            continue
        more = [start if word == "INIT" else word for word in words]
        runs = [one_run([f"--data.path={data}", *settings, *more, f"--train.seed={seed}"]) for seed in SEEDS]
        first = next(iter(done.values()))["seeds"] if done else runs
        shown = ["--model.init-from=the language model" if word == "INIT" else word for word in words]
        done[variant] = {"settings": shown, **summary(runs, first)}
        write_json(given.out, result)
        found = done[variant]["MRR@10 to the first"]
        print(
            f"{variant}: MRR@10 {done[variant]['mean']['MRR@10']:.4f}, {found['difference']:+.4f}", flush=True
        )


if __name__ == "__main__":
    main()
