"""Predict from a bundle with PyTorch only: `python export/load_torch.py BUNDLE`.

Uses the bundle's own torch_runtime.py; copy that file into your project to do the same. Every file is checked
against the manifest before any of its code runs.
"""

import sys
from pathlib import Path

import torch
from bundle_files import BundleError, torch_runtime


def main() -> None:
    """Load, repeat the golden requests, predict for one conversation, take one training step."""
    if len(sys.argv) != 2:
        sys.exit("usage: python export/load_torch.py BUNDLE")
    bundle = Path(sys.argv[1])
    try:
        runtime = torch_runtime(bundle)
    except BundleError as mistake:
        print(f"load_torch: {mistake}", file=sys.stderr)
        sys.exit(2)

    model = runtime.load_bundle(bundle)
    print(f"parameters: {model.get_num_params():,}")

    golden = runtime.read_safetensors(bundle / "golden.safetensors")
    texts = "input_ids" in golden
    names = ("input_ids", "attention_mask") if texts else ("context", "query", "context_mask")
    with torch.inference_mode():
        answers = model(*(golden[name] for name in names))
    difference = (answers - golden["embedding"]).abs().max().item()
    print(f"golden requests: {len(answers)}, largest difference {difference:.1e}")
    if not difference <= 1e-4:  # room for processors that round differently
        sys.exit("this machine does not compute what the model should")

    if texts:  # with the package tokenizers: runtime.load_tokenizer(bundle)([turns], [query])
        given = golden["input_ids"][:1], golden["attention_mask"][:1]
    else:  # your encoder's vectors: any number of turns up to max_context_length, no padding needed
        vectors = torch.nn.functional.normalize(torch.randn(1, 2, model.config.input_dim), dim=-1)
        given = vectors[:, :1], vectors[:, 1]
    with torch.inference_mode():
        embedding = model(*given)
    print(
        f"prediction: {tuple(embedding.shape)}, norm {embedding.norm().item():.4f}; search your index with it"
    )

    model.train()  # it is an ordinary module: go on training it
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    right = torch.nn.functional.normalize(torch.randn(1, model.config.output_dim), dim=-1)
    loss = 1 - (model(*given) * right).sum()
    loss.backward()
    optimizer.step()
    print(f"one training step: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
