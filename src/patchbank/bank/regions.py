"""Banks of regions: the regions of each image, in the order of their extraction."""

from __future__ import annotations

from patchbank.bank.reader import Bank
from patchbank.errors import BankError
from patchbank.regions import image_of, name_of


def regions_by_image(bank: Bank) -> dict[str, dict[str, str]]:
    """image -> {name: key} of its regions with features, in the dataset's order.

    Raises BankError if the bank has none.
    """
    if not bank.manifest.input.cut:
        raise BankError(f"{bank.path} holds features of whole images, and not of regions.")
    found: dict[str, dict[str, str]] = {}
    for key in bank.in_order():
        found.setdefault(image_of(key), {})[name_of(key)] = key
    return found
