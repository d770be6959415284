"""`patchbank`, with one more model in its registry: the tests' tiny one. Everything else is the real program."""

from patchbank.cli import main
from patchbank.encoders.openai.registry import MODELS
from tests.support import TINY

if __name__ == "__main__":
    MODELS[TINY.name] = TINY
    main()
