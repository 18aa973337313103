"""``patch-model schema``: the JSON schema of a recipe, for editors."""

from __future__ import annotations

import json

import click


@click.command("schema", short_help="Print the JSON schema of a recipe.")
def schema() -> None:
    """Print the JSON schema of a recipe.

    Save it beside a recipe and point your editor at it with the recipe's first line:

    \b
    # yaml-language-server: $schema=./recipe.schema.json
    """
    from patcher.recipe.schema import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))
