"""What is in a bank's regions? A linear probe on [human; object; union] predicts the verb of each annotated pair.

    python examples/union_probe.py [ROOT] [--dataset hicodet] [--train DIR] [--test DIR] [--epochs 200]

ROOT is an EZ-HOI root, such as `patchbank demo` lays out (the default). The probe learns from the training split's
bank and is tested on the other one; the table gives the average precision of each verb that has pairs there
(scikit-learn's), and the mean. Needs `pip install -e ".[examples]"`.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import patchbank

try:
    from sklearn.metrics import average_precision_score
except ImportError as error:
    raise SystemExit('error: this example needs scikit-learn: pip install "patchbank[examples]"') from error


def pairs(root: Path, name: str, split: str, directory: Path | None) -> tuple[Tensor, Tensor, float]:
    """All pairs of a split: (P, 3 D) pooled features, (P,) verbs, and how much of their union boxes the model saw."""
    dataset = patchbank.load_dataset(name, root, split).with_pairs()
    bank = directory or root / f"{name}_pkl_files/demo_img_{name}_{split}"
    samples = patchbank.FeatureDataset(bank, dataset, "human,object,union")
    features, verbs, seen = [], [], []
    for index in range(len(samples)):
        _, target = samples[index]
        features.append(torch.cat(list(target.regions.values()), dim=1))
        verbs.append(target.verb)
        seen.append(target.transform.visible_fraction(patchbank.union_boxes(target.boxes_h, target.boxes_o)))
    if not features:
        raise patchbank.PatchbankError(f"{dataset.title} has no pairs.")
    return torch.cat(features), torch.cat(verbs), float(torch.cat(seen).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path("patchbank-demo"))
    parser.add_argument("--dataset", default="hicodet", choices=["hicodet", "vcoco"])
    parser.add_argument("--train", type=Path, help="default: the demo's")
    parser.add_argument("--test", type=Path, help="likewise")
    parser.add_argument("--epochs", type=int, default=200)
    options = parser.parse_args()
    torch.manual_seed(0)

    name, tested = options.dataset, "test" if options.dataset == "hicodet" else "val"
    features, verbs, seen = pairs(options.root, name, "train", options.train)
    test_features, test_verbs, test_seen = pairs(options.root, name, tested, options.test)
    print(f"train: {len(verbs)} pairs, {seen:.0%} of their union boxes seen by the model")
    print(f"{tested}: {len(test_verbs)} pairs, {test_seen:.0%} seen")

    mean, scale = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    features, test_features = (features - mean) / scale, (test_features - mean) / scale
    known, both = torch.cat([verbs, test_verbs]).unique(return_inverse=True)  # no probe for verbs that nobody does
    verbs, test_verbs = both.split([len(verbs), len(test_verbs)])
    count = len(known)
    probe = nn.Linear(features.shape[1], count)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=1e-2)
    labels = F.one_hot(verbs, count).float()
    for _ in range(options.epochs):
        for rows in torch.randperm(len(verbs)).split(4096):
            loss = F.binary_cross_entropy_with_logits(probe(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"loss after {options.epochs} epochs: {loss.item():.4f}\n")

    scores = probe(test_features).detach().numpy()
    names = patchbank.load_dataset(name, options.root, tested).pairs.classes
    precisions = []
    print(f"{'verb, 0-based':<24} {'train':>6} {tested:>6} {'AP':>7}")
    for verb in test_verbs.unique().tolist():
        precisions.append(average_precision_score((test_verbs == verb).numpy(), scores[:, verb]))
        title = names.verbs[known[verb]] if names else f"verb {known[verb]}"
        counts = int((verbs == verb).sum()), int((test_verbs == verb).sum())
        print(f"{title:<24} {counts[0]:>6} {counts[1]:>6} {precisions[-1]:>7.3f}")
    print(f"{'mean':<24} {len(verbs):>6} {len(test_verbs):>6} {sum(precisions) / len(precisions):>7.3f}")


if __name__ == "__main__":
    try:
        main()
    except patchbank.PatchbankError as error:
        raise SystemExit(f"error: {error}") from error
