"""``python -m patchbank`` is ``patchbank``."""

from patchbank.cli import main

if __name__ == "__main__":
    main()
