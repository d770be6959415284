"""Prompt learning on a bank: learnable prompts look at an image's patch tokens through an adapter, and tell its verbs.

    python examples/prompt_adapter.py [ROOT] [--dataset hicodet] [--split train] [--bank DIR] [--epochs 40]
        [--checkpoint prompt_adapter.pt]

ROOT is an EZ-HOI root, such as `patchbank demo` lays out (the default). Tokens are brought to unit length and down to
64 dimensions; prompts attend to them (queries: the prompts; keys and values: the tokens) and are read by one linear
layer, which says of each verb whether it is to be seen in the image: a multi-label loss. The encoder is never loaded.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import patchbank


class PromptAdapter(nn.Module):
    """Patch tokens (B, N, D), of any length, to a logit for each verb, (B, verbs)."""

    def __init__(self, dim: int, verbs: int, prompts: int = 8, width: int = 64) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Linear(dim, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, width))
        self.prompts = nn.Parameter(0.02 * torch.randn(prompts, width))
        self.attention = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.verbs = nn.Linear(prompts * width, verbs)

    def forward(self, tokens: Tensor) -> Tensor:
        keys = self.down(F.normalize(tokens, dim=-1))  # (B, N, width)
        queries = self.prompts.expand(len(tokens), -1, -1)  # (B, prompts, width)
        adapted = self.norm(queries + self.attention(queries, keys, keys, need_weights=False)[0])
        return self.verbs(adapted.flatten(1))


def verbs_of(targets: list[patchbank.HOITarget], count: int) -> Tensor:
    """(B, verbs): 1 for each verb that an image's pairs have."""
    labels = torch.zeros(len(targets), count)
    for row, target in zip(labels, targets, strict=True):
        row[target.verb] = 1
    return labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path("patchbank-demo"))
    parser.add_argument("--dataset", default="hicodet", choices=["hicodet", "vcoco"])
    parser.add_argument("--split", default="train")
    parser.add_argument("--bank", type=Path, help="default: the demo's")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=Path("prompt_adapter.pt"))
    options = parser.parse_args()
    if options.epochs < 1 or not options.checkpoint.absolute().parent.is_dir():
        parser.error("--epochs is at least 1, and the directory of --checkpoint must be there")
    torch.manual_seed(0)

    dataset = patchbank.load_dataset(options.dataset, options.root, options.split)
    name = f"{options.dataset}_pkl_files/demo_img_{options.dataset}_{options.split}"
    samples = patchbank.FeatureDataset(
        options.bank or options.root / name, dataset, transform=patchbank.RandomHorizontalFlip()
    )
    verbs = 117 if options.dataset == "hicodet" else len(dataset.classes.verbs)
    adapter = PromptAdapter(samples.bank.manifest.shape[1], verbs)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    loader = DataLoader(samples, 32, shuffle=True, collate_fn=patchbank.collate, num_workers=options.workers)

    print(f"{len(samples)} images of {dataset.title}, {sum(len(dataset.target(r.key)) for r in dataset.samples)} pairs")
    for epoch in range(1, options.epochs + 1):
        total = 0.0
        for tokens, targets in loader:
            loss = F.binary_cross_entropy_with_logits(adapter(tokens), verbs_of(targets, verbs))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(tokens)
        if epoch in (1, options.epochs) or epoch % max(1, options.epochs // 5) == 0:
            print(f"epoch {epoch:3}: loss {total / len(samples):.4f}")

    torch.save(adapter.state_dict(), options.checkpoint)
    again = PromptAdapter(samples.bank.manifest.shape[1], verbs)
    again.load_state_dict(torch.load(options.checkpoint, weights_only=True))
    tokens = samples.bank[samples.dataset.samples[0].key].float()[None]
    with torch.no_grad():
        assert torch.equal(adapter.eval()(tokens), again.eval()(tokens))
    print(f"{options.checkpoint}: saved, and reloaded to the same predictions")


if __name__ == "__main__":
    try:
        main()
    except patchbank.PatchbankError as error:
        raise SystemExit(f"error: {error}") from error
