"""Find the images nearest to one of a bank's, by their global context: the mean of their patch tokens.

    python examples/global_search.py BANK [KEY] [--count 5]

Without KEY, the first one of the bank. Run `patchbank demo` first, for example, and take
patchbank-demo/hicodet_pkl_files/demo_img_hicodet_train.
"""

import argparse

import torch

import patchbank

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("bank")
parser.add_argument("key", nargs="?")
parser.add_argument("--count", type=int, default=5)
options = parser.parse_args()

try:
    bank = patchbank.open_bank(options.bank)
    keys = list(bank)
    key = options.key or keys[0]
    wanted = keys.index(key) if key in bank else bank[key]  # reading it says what is wrong
except patchbank.PatchbankError as error:
    raise SystemExit(f"error: {error}") from error

contexts = torch.stack([patchbank.global_context(bank[each].float(), bank.transform(each)) for each in keys])
contexts = torch.nn.functional.normalize(contexts - contexts.mean(0), dim=1)  # what all images share says nothing
similarity = contexts @ contexts[wanted]
print(f"Nearest to {key}, by the cosine of what is left after the mean of all {len(keys)}:")
for index in similarity.argsort(descending=True)[: options.count + 1].tolist():
    if index != wanted:
        print(f"  {similarity[index]:+.3f}  {keys[index]}")
