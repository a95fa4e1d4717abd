"""The curves of a run in wandb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes import config
from recipes.config import Recipe, RecipeError


def check(recipe: Recipe) -> None:
    """Raises RecipeError, before anything is built, if wandb cannot be used as the recipe says; disabled it is no part
    of the program."""
    if recipe.wandb.mode == "disabled":
        return
    try:
        import wandb

        if recipe.wandb.mode == "online":
            wandb.setup(wandb.Settings(silent=True))
            wandb.login(verify=True)  # asks for a key if there is a terminal
    except Exception as error:  # no wandb, no key, a wrong one, or no server
        raise _refusal(recipe, error) from error


class Tracker:
    """One wandb run over all starts of a run.

    Offline, every start leaves a piece, all of one id. ``wandb sync`` appends the pieces in the order of their starts,
    and renumbers one whose steps do not lie after those that are there. So wandb's step is the step of training, and a
    resumed run goes on where the one before ended. Steps that a dying run had not saved are taken again and stand
    twice, equal: charts go by ``step``, which nobody renumbers. Other ids would be other curves, and ``resume_from``
    asks the server for what an offline run does not have.
    """

    def __init__(self, folder: Path, recipe: Recipe, run_id: str) -> None:
        """Raises RecipeError if wandb does not start."""
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
        """Adds values to the row of a step; wandb writes a row when a later step begins."""
        self._run.log({**values, "step": step}, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)
        self._run.finish(exit_code=int(summary["status"] == "failed"))


def _refusal(recipe: Recipe, error: Exception) -> RecipeError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return RecipeError(
        f"wandb.mode={recipe.wandb.mode}, wandb.project={recipe.wandb.project}: {reason}; mend it, or set "
        "wandb.mode=offline (and use `wandb sync` later) or wandb.mode=disabled"
    )
