"""What a recipe comes to, or what is wrong with it, in one process: ``python -m recipes.check RECIPE [key=value ...]``.

`make train` calls it first, so that a mistake is one line and not the report of a launcher about each of its processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recipes import config, data
from recipes.load import dump, load_recipe
from recipes.validate import processes, validate


def main(arguments: Sequence[str]) -> int:
    """Print the resolved recipe and return 0, or say why WORLD_SIZE (1) processes cannot run it and return 2."""
    if not arguments:
        print("usage: python -m recipes.check RECIPE.yaml [key=value ...]")
        return 2
    try:
        recipe = load_recipe(arguments[0], arguments[1:])
        validate(recipe, processes())
        data.read_corpus(recipe.data)
    except config.RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(dump(recipe), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
