"""Names on disk: how a class's parameter is called in a given checkpoint."""

from __future__ import annotations

from collections.abc import Collection

from patcher.errors import InputError

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Of wrappers that can stand anywhere in a name: modules are compiled or checkpointed one by one, too."""


def spellings(parameter: str, base_prefix: str) -> list[str]:
    """A class's name for a parameter, and the other one that a checkpoint may have for it.

    Checkpoints of the bare model leave the prefix out (GPT-2's released files, BLOOM's); a few add one.
    """
    if not base_prefix:
        return [parameter]
    prefix = base_prefix + "."
    return [parameter, parameter.removeprefix(prefix) if parameter.startswith(prefix) else prefix + parameter]


def stored_name(parameter: str, stored: Collection[str], base_prefix: str) -> str | None:
    """The key under which ``parameter`` is stored, or None."""
    return next((name for name in spellings(parameter, base_prefix) if name in stored), None)


def name_for_new(parameter: str, stored: Collection[str], base_prefix: str) -> tuple[str, str | None]:
    """The key for a parameter that the checkpoint lacks, in the style of its neighbours.

    Returns:
        The key, and the stored weight beside it (None where the module has no stored weight).

    Raises:
        InputError: the checkpoint names its tensors in a way that gives no place for it.
    """
    module, _, leaf = parameter.rpartition(".")
    sibling = stored_name(f"{module}.weight", stored, base_prefix)
    if sibling is not None:
        return sibling.removesuffix("weight") + leaf, sibling
    for name in stored:
        owner = name.rpartition(".")[0]
        if owner in (module, module.removeprefix(base_prefix + ".")):
            return f"{owner}.{leaf}", name
    raise InputError(
        f"the checkpoint stores no tensor of `{module}`, so it is not known what its bias would be called",
        where=parameter,
    )
