"""Which column of a data set is which: named in the recipe, or known by its name; never guessed by its likeness."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from patcher.errors import InputError
from patcher.pairs.messages import is_conversation, read_conversation
from patcher.pairs.pair import Record, Table
from patcher.pairs.problems import RowProblem
from patcher.pairs.unknown_columns import (
    AB_NAMES,
    PAIR_NAMES,
    first_place,
    keys_of,
    listed,
    lists_remedy,
    misspelt,
    unknown_columns,
)
from patcher.recipe.pairs import Columns

Format = Literal["ab", "pairs"]
AskedFormat = Literal["auto", "ab", "pairs"]

AB = dict(zip(("prompt", "positive", "negative"), AB_NAMES, strict=True))
"""Model-written evaluations (Perez et al. 2022) and CAA (Rimsky et al. 2024)."""
PAIRS = {name: name for name in PAIR_NAMES}
_OTHER_SIDES = (
    {"positive": "positives", "negative": "negatives"},
    {"positive": "pos", "negative": "neg"},
    {"positive": "chosen", "negative": "rejected"},
)
_PROMPTS = (
    "question",
    "instruction",
    "input",
    "query",
    "context",
    "history",
    "conversation",
    "conversations",
    "anchor",
)
_SYSTEMS = ("system", "system_prompt")
_IMAGES = ("image", "images")


@dataclass(frozen=True)
class Form:
    """How the rows of a data set are read.

    Attributes:
        format: ``ab``: answers to questions with choices.
        columns: ``prompt``, ``system``, ``positive``, ``negative`` -> the column, of those that there are.
        optional: those whose column a row may lack.
        preference: whether it is preference data, in which a row may hold no contrast.
        judge: for preference data that holds two responses and a judgement: its column, and what it says of a value:
            whether the response in ``positive`` is the better one; None for neither.
        image: the column of the images, which a row may lack, or None.
    """

    format: Format
    columns: Mapping[str, str]
    optional: frozenset[str] = frozenset(("prompt", "system"))
    preference: bool = False
    judge: tuple[str, Callable[[Any], bool | None]] | None = None
    image: str | None = None


def _by_sign(value: Any) -> bool | None:
    """HelpSteer: from -3, the first response is much better, to 3, the second is."""
    return None if not isinstance(value, int | float) or value == 0 else value < 0


def _by_name(value: Any) -> bool | None:
    return value in ("model_a", 1) if value in ("model_a", "model_b", 1, 0) else None


def _by_number(value: Any) -> bool | None:
    return value == 0 if value in (0, 1) else None


_JUDGED = (
    ("response1", "response2", "overall_preference", _by_sign),  # HelpSteer3
    ("response_1", "response_2", "preference_strength", _by_sign),  # HelpSteer2
    ("human_ref_A", "human_ref_B", "labels", _by_name),  # SHP
    ("conversation_a", "conversation_b", "winner", _by_name),  # Chatbot Arena
    ("response_0", "response_1", "better_response_id", _by_number),  # PKU-SafeRLHF, which judges twice
    ("response_0", "response_1", "safer_response_id", _by_number),
)


def names_in(table: Table) -> list[str]:
    """The columns: of the first row, or the names of the lists."""
    return [str(name) for name in (table.lists if table.lists is not None else table.rows[0].values)]


def fits(names: Sequence[str], asked: AskedFormat, columns: Columns | None) -> bool:
    """Whether a table with these columns is read without more being said."""
    if columns is not None:
        return all(column in names or column.partition(".")[0] in names for column in columns.named.values())
    if asked == "ab":
        return all(column in names for column in AB.values())
    return _known(names) is not None


def value_at(values: Mapping[str, Any], column: str) -> Any:
    """What a row holds in a column; ``a.b`` and ``a.0`` lead into what ``a`` holds.

    Raises:
        KeyError: there is no such column.
    """
    if column in values:
        return values[column]
    found: Any = values
    for step in column.split("."):
        try:
            found = found[step] if isinstance(found, Mapping) else found[int(step)]
        except (KeyError, ValueError, IndexError, TypeError):
            raise KeyError(column) from None
    return found


def choose_form(table: Table, asked: AskedFormat, columns: Columns | None, where: str, source: str) -> Form:
    """How the rows of a table are read; what was not said by name is noted.

    Args:
        where: the recipe's key of the columns, for errors.
        source: the name of the data set.

    Raises:
        InputError: its columns are unknown, or there is more than one way.
    """
    images = _images_in(table)
    if columns is not None:
        if columns.image is None and images is not None:
            line = f"`columns: {{..., image: {images}}}`"
            table.notes.append(f"the column `{images}` is not used; as the images it would be named by {line}")
        return _asked_for(table, asked, columns, where)
    form = _form_by_names(table, asked, where, source)
    if images is None:
        return form
    table.notes.append(f"`{images}` holds the images of the pairs")
    return replace(form, image=images)


def _images_in(table: Table) -> str | None:
    """The column that holds images, by its name."""
    if table.lists is not None:
        names = names_in(table)
    else:
        # The first row may lack one.
        names = [str(name) for row in table.rows for name, value in row.values.items() if value is not None]
    names = list(dict.fromkeys(names))
    return next((name for known in _IMAGES for name in names if _folded(name) == known), None)


def _form_by_names(table: Table, asked: AskedFormat, where: str, source: str) -> Form:
    names = names_in(table)
    ab, pairs = (all(name in names for name in sides.values()) for sides in (AB, PAIRS))
    if asked == "ab" or (asked == "auto" and ab and not pairs):
        return Form("ab", AB, frozenset())
    if pairs and (asked == "pairs" or not ab):
        _say_unused(table, names)
        return Form("pairs", {**PAIRS, "prompt": "prompt"})
    if ab and pairs and asked == "auto":
        raise InputError(
            "the first row has the keys of both formats",
            where=first_place(table, source),
            found=keys_of(names),
            remedy="say which to use: `format: ab` or `format: pairs`",
        )
    known = _known(names, ab=asked == "auto")
    if known is not None:
        return _with_prompt(known, names, table, where)
    if asked == "pairs" and table.lists is None:
        return Form("pairs", {**PAIRS, "prompt": "prompt"})
    # Not complete, but clearly one of them: the missing key is then named for every row.
    begun = [form for form in (Form("ab", AB), Form("pairs", {**PAIRS, "prompt": "prompt"})) if _begun(form, names)]
    if len(begun) == 1 and table.lists is None:
        return begun[0]
    raise unknown_columns(table, names, source, in_evaluate=where.startswith("evaluate."))


def rows_of(table: Table, form: Form, source: str) -> list[Record]:
    """The rows of a table; lists of equal length are rows by their order, which is noted.

    Raises:
        InputError: the lists are of different lengths.
    """
    if table.lists is None:
        return table.rows
    names = [name for name in (*form.columns.values(), form.image) if name is not None and name in table.lists]
    lengths = {name: len(table.lists[name]) for name in names}
    if len(set(lengths.values())) > 1:
        raise InputError(
            "lists of different lengths cannot be pairs by their order",
            where=source,
            found=", ".join(f"`{name}`: {length}" for name, length in lengths.items()),
            remedy="if they have no partners, the mean over each is enough: "
            + lists_remedy(source, form.columns["positive"], form.columns["negative"]),
        )
    table.notes.append(f"the lists {listed(names)} of {source} are pairs by their order")
    rows = zip(*(table.lists[name] for name in names), strict=True)
    return [Record(dict(zip(names, row, strict=True)), f"{source}[{index}]") for index, row in enumerate(rows)]


def _asked_for(table: Table, asked: AskedFormat, columns: Columns, where: str) -> Form:
    named = columns.named
    if named["positive"] == named["negative"]:
        raise InputError(f"both sides are the column `{named['positive']}`", where=where)
    if asked == "ab" and "prompt" not in named:
        remedy = f"add `prompt: {AB['prompt']}` or what it is called"
        raise InputError("`format: ab` needs the column of the question", where=where, remedy=remedy)
    for column in named.values():
        if table.lists is not None:
            there = column in table.lists
        else:
            there = not table.rows or any(_has(row, column) for row in table.rows)
        if not there:
            names = keys_of(names_in(table))
            raise InputError(f"there is no column `{column}`", where=where, found=names, remedy="name one of these")
    preference = {named["positive"], named["negative"]} == {"chosen", "rejected"}
    # A member of an answer, as the refusal of a list of answers advises, is still the answer to a question.
    image = named.pop("image", None)
    of_ab = {key: column.removesuffix(".0") for key, column in named.items()} == AB
    table.notes += [
        f"`{judgement}` says which of `{first}` and `{second}` is better, and is not looked at, since `columns` names "
        "the sides"
        for first, second, judgement, _better in _JUDGED
        if {named["positive"], named["negative"]} == {first, second} and judgement in names_in(table)
    ]
    format: Format = "ab" if asked == "ab" or (asked == "auto" and of_ab) else "pairs"
    return Form(format, named, frozenset(), preference, image=image)


def _has(row: Record, column: str) -> bool:
    try:
        value_at(row.values, column)
    except KeyError:
        return False
    return True


def _folded(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _known(names: Sequence[str], *, ab: bool = True) -> Form | None:
    """A form that is known by its names, in whatever letters they are written."""
    there: dict[str, str | None] = {}
    for name in names:
        # Names that differ in their letters' case alone are no names to go by.
        there[_folded(name)] = None if _folded(name) in there else name

    def all_there(*wanted: str) -> list[str] | None:
        found = [name if name in names else there.get(_folded(name)) for name in wanted]
        return None if None in found else [str(name) for name in found]

    answers = all_there(*AB.values()) if ab else None
    if answers:
        return Form("ab", dict(zip(AB, answers, strict=True)), frozenset())
    for sides in (PAIRS, *_OTHER_SIDES):
        columns = all_there(*sides.values())
        if columns:
            found = dict(zip(sides, columns, strict=True))
            return Form("pairs", found, preference=sides["positive"] == "chosen")
    judged = [(all_there(*names_of), better) for *names_of, better in _JUDGED]
    forms = [
        Form("pairs", {"positive": columns[0], "negative": columns[1]}, preference=True, judge=(columns[2], better))
        for columns, better in judged
        if columns
    ]
    return forms[0] if len(forms) == 1 else None


def _with_prompt(form: Form, names: Sequence[str], table: Table, where: str) -> Form:
    columns = dict(form.columns)
    for key, known in (("prompt", ("prompt", *_PROMPTS)), ("system", _SYSTEMS)):
        if key in columns or (key == "system" and not form.preference):
            continue
        there = [name for name in names if _folded(name) in (known if form.preference else known[:1])]
        exact = [name for name in there if _folded(name) == key]
        if len(there) > 1 and table.lists is None:
            there = [name for name in there if any(row.values.get(name) for row in table.rows)]
        if key == "prompt" and not there and "messages" in names and _ends_with_the_user(table):
            there = ["messages"]
        if len(exact or there) > 1:
            found, example = ", ".join(exact or there), {**columns, key: "<a column>"}
            line = ", ".join(f"{role}: {column}" for role, column in example.items())
            message = f"several columns may be the {key} of these rows"
            raise InputError(message, where=where, found=found, remedy=f"say which: `columns: {{{line}}}`")
        if there:
            columns[key] = (exact or there)[0]
    sides = f"`{columns['positive']}` and `{columns['negative']}`"
    if form.judge:
        said = f"of {sides} the better one by `{form.judge[0]}` is the positive side"
    else:
        said = f"`{columns['positive']}` is the positive side, `{columns['negative']}` the negative one"
    more = "".join(f", `{columns[key]}` the {key}" for key in ("prompt", "system") if key in columns)
    table.notes.append(said + more)
    if "prompt" not in columns:
        _say_unused(table, names)
    return replace(form, columns=columns)


def _ends_with_the_user(table: Table) -> bool:
    """Whether `messages` are what is asked; elsewhere they hold the chosen answer as well."""
    row = next(iter(table.rows), None)
    if row is None or not is_conversation(row.values.get("messages")):
        return False
    try:
        return read_conversation(row.values["messages"], "messages", row.origin)[-1].role == "user"
    except RowProblem:
        return False


def _say_unused(table: Table, names: Sequence[str]) -> None:
    unused = [name for name in names if _folded(name) in _PROMPTS]
    table.notes += [
        f"the column `{name}` is not used; as a system prompt it would be named by `columns: {{system: {name}, ...}}`"
        for name in names
        if _folded(name) in _SYSTEMS
    ]
    if "prompt" not in names and unused:
        line = f"`columns: {{prompt: {unused[0]}, positive: ..., negative: ...}}`"
        table.notes.append(f"the column `{unused[0]}` is not used; as a prompt it would be named by {line}")


def _begun(form: Form, names: Sequence[str]) -> bool:
    sides = [form.columns["positive"], form.columns["negative"]]
    needed = [*sides, AB["prompt"]] if form.format == "ab" else sides
    missing = [name for name in needed if name not in names]
    return len(set(sides) & set(names)) > 0 or list(names) == needed[2:] or misspelt(missing, names, needed) is not None
