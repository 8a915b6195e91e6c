"""Proves, in an environment with the extra `operator` only, that the operator's half of kvpool needs no engine."""

import importlib
import importlib.util
import sys

IMPORTED = ("kvpool", "kvpool.api", "kvpool.config", "kvpool.errors", "kvpool_operator")
ABSENT = ("torch", "numpy", "transformers", "xxhash", "rich", "typer")


def main() -> int:
    """Import the operator's half; say what is wrong and return 1, or return 0."""
    installed = [name for name in ABSENT if importlib.util.find_spec(name)]
    if installed:
        print(f"check-operator: the extra `operator` installed {', '.join(installed)}", file=sys.stderr)
        return 1
    for name in IMPORTED:
        importlib.import_module(name)
    print(f"check-operator: {', '.join(IMPORTED)} import without {', '.join(ABSENT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
