"""The fixtures of training runs, for the test of several machines."""

from tests.recipes.conftest import tiny, train  # noqa: F401
