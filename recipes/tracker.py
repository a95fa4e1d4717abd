"""Record the curves of a run in wandb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes import config
from recipes.config import Recipe, RecipeError


def check(recipe: Recipe) -> None:
    """Raise RecipeError, before anything is built, if wandb cannot run in the recipe's mode.

    The mode "disabled" does not import wandb at all.
    """
    if recipe.wandb.mode == "disabled":
        return
    try:
        import wandb

        if recipe.wandb.mode == "online":
            wandb.setup(wandb.Settings(silent=True))
            wandb.login(verify=True)  # asks for a key if there is a terminal to ask on
    except Exception as error:  # no wandb, no key, a wrong key or no server
        raise _refusal(recipe, error) from error


class Tracker:
    """Log all starts of a run as one wandb run.

    Offline, every start writes a piece with the same id. ``wandb sync`` appends the pieces in the order of their
    starts, and renumbers a piece if its steps do not follow the earlier ones. wandb's step is therefore the step of
    training, and a resumed run continues the curve. A run that dies repeats its unsaved steps, with equal values.
    Charts use ``step``, which wandb does not renumber. Other ids would make other curves, and ``resume_from`` needs
    the server.
    """

    def __init__(self, folder: Path, recipe: Recipe, run_id: str) -> None:
        """Start wandb; raise RecipeError if it does not start."""
        import wandb

        try:
            self._run = wandb.init(
                project=recipe.wandb.project,
                group=recipe.wandb.group or recipe.name.split("/")[0],
                name=recipe.name,
                id=run_id,
                resume="allow",
                mode=recipe.wandb.mode,
                dir=folder,
                config=config.flat(recipe),
                settings=wandb.Settings(silent=True, console="off", disable_code=True, x_disable_stats=True),
            )
        except Exception as error:
            raise _refusal(recipe, error) from error
        self._run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, Any], step: int) -> None:
        """Add values to the row of a step; wandb writes a row when a later step begins."""
        self._run.log({**values, "step": step}, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)
        self._run.finish(exit_code=int(summary["status"] == "failed"))


def _refusal(recipe: Recipe, error: Exception) -> RecipeError:
    return RecipeError(
        f"wandb.mode={recipe.wandb.mode}, wandb.project={recipe.wandb.project}: {config.first_line(error)}; mend it, "
        "or set wandb.mode=offline (and use `wandb sync` later) or wandb.mode=disabled"
    )
