"""`patchbank`, with one more model in its registry: the tests' tiny one. Everything else is the real program."""

import os

from patchbank.cli import main
from patchbank.encoders.openai.registry import MODELS, Model
from tests.support import TINY

if __name__ == "__main__":
    MODELS[TINY.name] = TINY
    if url := os.environ.get("TINY_URL"):  # a server that the test started
        MODELS[TINY.name] = Model(**{**TINY.__dict__, "url": url, "sha256": os.environ["TINY_SHA256"]})
    main()
