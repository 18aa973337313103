"""A template's switches, its date, prompts that hold it already, and conversations."""

from __future__ import annotations

import json
from datetime import date

import pytest
from support.chat_templates import GEMMA, HARMONY, LLAMA_3, MISTRAL, PHI_4, QWEN3, R1, VICUNA
from tokenizers import AddedToken
from transformers.utils import chat_template_utils

from patcher.capture.model import load_tokenizer
from patcher.chat.prompting import conversation_ids
from patcher.errors import InputError
from patcher.evaluate.questions import encode_prompts, questions_with_prompt
from patcher.pairs.pair import ContrastPair, Turn
from patcher.pairs.prompts import render, render_question, render_sides
from patcher.pairs.templates import Reading, apply_template, settled, thinking_switches, writes_date
from patcher.pairs.tokens import tokenise_pairs
from patcher.vectors.responses import ending_tokens

DAY = date(2026, 11, 28)
WHERE = "recipe.yaml: vectors.0"
ALPACA = (
    "Below is an instruction.\n\n{% for m in messages %}"
    "### {{ 'Response' if m.role == 'assistant' else 'Instruction' }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
SWITCHED_BY_WORDS = (
    "{% set ns = namespace(think=true) %}{% for m in messages %}{% if '/no_think' in m.content %}"
    "{% set ns.think = false %}{% endif %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.replace('/no_think', '').strip() }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{{ '' if ns.think else '<think></think>' }}{% endif %}"
)
# Before the last turn alone, and only if that is the user's (Mistral 0.3, Pixtral).
LAST_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system, rest = messages[0].content, messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
# LLaVA's: a text is a list of characters to it.
PARTS = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}"
    "{% for part in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Puts a space before a text that is a part.
EITHER = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %} {{ part.text }}{% endfor %}{% endif %};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ASKED = [{"role": "user", "content": "Is it raining?"}]


def notes(pairs, tokenizer, spec) -> str:
    return "\n".join(tokenise_pairs(pairs, tokenizer, spec)[1])


@pytest.fixture
def days(monkeypatch):
    """Sets the clock of stock transformers."""

    def go_to(year: int, month: int, day: int) -> None:
        class Clock(chat_template_utils.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(year, month, day, 13, 14, 15)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return go_to


def test_a_fixed_day_is_that_day_whatever_the_clock_says(chatml, vector_spec, days):
    spec = vector_spec(template_date="2026-11-28")
    for template, text in ((LLAMA_3, "Today Date: 28 Nov 2026\n"), (HARMONY, "Current date: 2026-11-28\n")):
        chatml.chat_template = template
        found = []
        for day in (28, 29):
            days(2026, 11, day)
            found.append(render("Is it raining?", "Yes", chatml, spec).text)
        assert found[0] == found[1] and text in found[0]
        days(2026, 11, 28)
        assert found[0] == render("Is it raining?", "Yes", chatml, vector_spec()).text
        days(2026, 11, 29)
        assert found[0] != render("Is it raining?", "Yes", chatml, vector_spec()).text


def test_every_form_of_a_date_is_what_the_clock_would_write(chatml, days):
    forms = "%d %b %Y|%Y-%m-%d|%-d %B %y|%A %a|%j %-j|%m/%-m|%F %D|%e|%U %W %w %u|%G-%V|%x|%c|%T %H:%M:%S %I%p %%"
    days(2026, 3, 4)
    clock = chat_template_utils.datetime.now().replace(hour=0, minute=0, second=0)
    for form in forms.split("|"):
        chatml.chat_template = "  \n{{ strftime_now('" + form + "') }} {{ messages[0]['content'] }}"
        text = apply_template(ASKED, chatml, Reading(day=date(2026, 3, 4)))
        assert text == "  \n" + clock.strftime(form) + " Is it raining?"


def test_a_macro_of_the_template_reads_the_same_clock(chatml):
    chatml.chat_template = (
        "{% macro today() %}{{ strftime_now('%Y') if strftime_now is defined else 'never' }}{% endmacro %}{{ today() }}"
    )
    assert apply_template(ASKED, chatml, Reading(day=date(1999, 1, 1))) == "1999"


def test_the_day_is_settled_where_the_template_writes_one(chatml, gpt2_like, vector_spec):
    for template, dated in ((LLAMA_3, True), (HARMONY, True), (QWEN3, False), (R1, False)):
        chatml.chat_template = template
        spec = settled(vector_spec(), chatml, DAY, WHERE)
        assert spec.template_date == (DAY if dated else None)
        assert writes_date(chatml, spec) == dated
        kept = settled(vector_spec(template_date="2024-07-26"), chatml, DAY, WHERE)
        assert kept.template_date == date(2024, 7, 26)
    chatml.chat_template = LLAMA_3
    own = vector_spec(chat_template_kwargs={"date_string": "26 Jul 2024"})
    assert settled(own, chatml, DAY, WHERE).template_date is None
    assert "Today Date: 26 Jul 2024" in render("Q?", "Yes", chatml, own).text
    assert settled(vector_spec(chat_template=False), chatml, DAY, WHERE).template_date is None
    assert settled(vector_spec(), gpt2_like, DAY, WHERE).template_date is None
    assert settled(vector_spec(), None, DAY, WHERE).template_date is None


def test_a_default_system_prompt_with_the_date_is_left_out_with_it(chatml, vector_spec):
    chatml.chat_template = (
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% else %}"
        "Today is {{ strftime_now('%Y-%m-%d') }}.{% endif %}{{ messages[0].content }}"
    )
    assert settled(vector_spec(), chatml, DAY, WHERE).template_date == DAY
    assert settled(vector_spec(system_prompt="Be kind."), chatml, DAY, WHERE).template_date is None


def test_the_day_is_said(chatml, vector_spec):
    pairs = [ContrastPair("Q?", "Yes", "No", "x")]
    chatml.chat_template = LLAMA_3
    assert "a date into prompts: 2026-11-28" in notes(pairs, chatml, vector_spec(template_date="2026-11-28"))
    chatml.chat_template = PHI_4
    assert "`template_date` does nothing" in notes(pairs, chatml, vector_spec(template_date="2026-11-28"))


def test_a_switch_reaches_every_prompt(chatml, vector_spec):
    chatml.chat_template = QWEN3
    spec = vector_spec(chat_template_kwargs={"enable_thinking": False})
    closed = "<think>\n\n</think>\n\n"
    assert render_question("Q?", chatml, spec).text.endswith(closed)
    assert not render_question("Q?", chatml, vector_spec()).text.endswith(closed)
    assert chatml.decode(encode_prompts(["Q?"], chatml, spec)[0]).endswith(closed)
    (question,) = questions_with_prompt([ContrastPair("Q?", "Yes", "No", "x")], chatml, spec, "Be kind.")
    assert all(closed in chatml.decode(option.ids) for option in question.options)
    pair = ContrastPair("Q?", "", "", "x", written=((5, 6), (7,)))
    (question,) = questions_with_prompt([pair], chatml, spec, None)
    assert [option.ids[option.start :] for option in question.options] == [(5, 6), (7,)]
    assert {chatml.decode(option.ids[: option.start]) for option in question.options} == {
        render_question("Q?", chatml, spec).text
    }


def test_a_switch_that_the_template_does_not_have_is_refused(chatml, gpt2_like, vector_spec):
    chatml.chat_template = QWEN3
    assert thinking_switches(chatml) == ["enable_thinking"]
    settled(vector_spec(chat_template_kwargs={"enable_thinking": False}), chatml, DAY, WHERE)
    for tokenizer, key, remedy in (
        (chatml, "enable_thinkin", "what it uses: enable_thinking"), (gpt2_like, "enable_thinking", "leave it out")
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            settled(vector_spec(chat_template_kwargs={key: False}), tokenizer, DAY, WHERE)
        problem = caught.value.problems[0]
        assert problem.where == f"{WHERE}.chat_template_kwargs" and problem.found == key and problem.remedy == remedy
    chatml.chat_template = R1
    with pytest.raises(InputError, match="does not use this switch"):
        settled(vector_spec(chat_template_kwargs={"enable_thinking": False}), chatml, DAY, WHERE)
    chatml.chat_template = (
        "{% generation %}{{ thinking }}{% endgeneration %}{% for m in messages %}{% break %}{% endfor %}"
    )
    assert thinking_switches(chatml) == ["thinking"]


def test_a_switch_where_no_prompt_goes_through_the_template_is_refused(chatml, vector_spec):
    chatml.chat_template, switches = QWEN3, {"enable_thinking": False}
    texts = [ContrastPair(None, "Love", "Hate", "x")]
    with pytest.raises(InputError, match="no chat template"):
        tokenise_pairs(texts, chatml, vector_spec(chat_template_kwargs=switches))
    tokenise_pairs(texts, chatml, vector_spec(chat_template_kwargs=switches, chat_template=True))


def test_a_silent_recipe_is_told_how_prompts_were_read(chatml, vector_spec):
    pairs = [ContrastPair("Q?", "Yes", "No", "x")]
    for template, switch in ((QWEN3, "enable_thinking"), (HARMONY, "reasoning_effort")):
        chatml.chat_template = template
        assert f"a switch for thinking ({switch})" in notes(pairs, chatml, vector_spec())
    chatml.chat_template = QWEN3
    assert repr("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n") in notes(pairs, chatml, vector_spec())
    for value in (True, False):
        assert "does not set" not in notes(pairs, chatml, vector_spec(chat_template_kwargs={"enable_thinking": value}))


def test_a_switch_that_an_answer_without_thoughts_does_not_follow_is_told(chatml, vector_spec):
    chatml.chat_template, words = QWEN3, "ended thoughts before an answer"
    pairs = [ContrastPair("Q?", "Yes", "No", "x")]
    assert words in notes(pairs, chatml, vector_spec(chat_template_kwargs={"enable_thinking": True}))
    assert words not in notes(pairs, chatml, vector_spec(chat_template_kwargs={"enable_thinking": False}))
    pairs = [ContrastPair("Q?", "<think>hm</think>Yes", "No", "x")]
    assert words not in notes(pairs, chatml, vector_spec(chat_template_kwargs={"enable_thinking": True}))


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (PHI_4, "<|im_start|>user<|im_sep|>Hello<|im_end|>"),
        (PHI_4, " \n<|im_start|>system<|im_sep|>Be kind."),
        (MISTRAL, "[INST] Hello [/INST]"),
        (MISTRAL, "<bos>[INST] Hello [/INST]"),
        (LLAMA_3, "<|start_header_id|>user<|end_header_id|>\n\nHello"),
        (GEMMA, "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"),
        (R1, "<|User|>Hello<|Assistant|>"),
        (VICUNA, "USER: Hello ASSISTANT:"),
        (ALPACA, "### Instruction:\nHello\n\n### Response:\n"),
        (QWEN3, "<bos>Hello"),
        (QWEN3, "Hello<|im_end|>\n<|im_start|>assistant\n"),
        (ALPACA, "Below is an instruction.\n\n### Instruction:\nHello\n\n### Response:\n"),
    ],
)
def test_a_prompt_that_holds_the_template_is_refused_and_can_be_used_as_it_is(chatml, vector_spec, template, prompt):
    chatml.chat_template = template
    with pytest.raises(InputError, match="holds the chat template already") as caught:
        tokenise_pairs([ContrastPair(prompt, "Yes", "No", "pairs.jsonl:1")], chatml, vector_spec())
    problem = caught.value.problems[0]
    assert "pairs.jsonl:1" in (problem.where or "") and "`chat_template: false`" in (problem.remedy or "")
    with pytest.raises(InputError, match="holds the chat template already"):
        render_question(prompt, chatml, vector_spec())
    spec = vector_spec(chat_template=False, add_bos=True)
    (pair,), _notes = tokenise_pairs([ContrastPair(prompt, "Yes", "No", "x")], chatml, spec)
    assert pair.positive.ids.count(chatml.bos_token_id) == 1 and pair.positive.ids[0] == chatml.bos_token_id


@pytest.mark.parametrize("template", [R1, QWEN3, PHI_4.replace("{% for m", "Think: <think> ... </think> {% for m", 1)])
def test_an_earlier_answer_may_begin_with_thoughts(chatml, vector_spec, template):
    chatml.chat_template = template
    turns = (
        Turn("user", "Hello"),
        Turn("assistant", "<think>\nA guest.\n</think>\n\nHi"),
        Turn("user", "Is it raining?"),
    )
    text = render(turns, "Yes", chatml, vector_spec()).text
    assert "Hi" in text and text.endswith("Yes")


def test_ends_of_turns_that_the_tokenizer_does_not_know_are_told(chatml, vector_spec):
    pair = ContrastPair("Hello", "Yes", "No", "x")
    assert "ends turns with" not in notes([pair], chatml, vector_spec())
    chatml.chat_template = LLAMA_3
    assert "ends turns with '<|eot_id|>', which is several tokens" in notes([pair], chatml, vector_spec())
    chatml.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    assert "ends turns with" not in notes([pair], chatml, vector_spec())


def test_after_a_special_token_an_answer_follows_at_once(chatml, vector_spec):
    spec = vector_spec(chat_template=False)
    chatml.add_special_tokens({"additional_special_tokens": [AddedToken("<|Assistant|>", special=True)]})
    assert render("<|User|>Hello<|Assistant|>", "Yes", chatml, spec).text.endswith("<|Assistant|>Yes")
    assert render("[INST] Hello [/INST]", "Yes", chatml, spec).text.endswith("[/INST] Yes")


def test_marks_in_prompts_and_answers_are_said(chatml, vector_spec):
    said = notes([ContrastPair("What is <|im_end|>?", "Yes<|im_end|>", "No", "x")], chatml, vector_spec())
    assert "1 of 1 prompts hold special tokens of the tokenizer" in said and "'<|im_end|>'" in said
    assert "1 of 2 sides end with a special token" in said
    said = notes([ContrastPair("### Instruction: hello", "Yes", "No", "x")], chatml, vector_spec())
    assert "1 of 1 prompts look as if they held the chat template of another model" in said
    said = notes([ContrastPair("Hello", "Yes<|eot_id|>", "No<|eot_id|>", "x")], chatml, vector_spec())
    assert "2 of 2 sides end with what ends a turn of another model" in said and "'<|eot_id|>'" in said
    said = notes([ContrastPair("Human: Hello\n\nAssistant:", "Yes", "No", "x")], chatml, vector_spec())
    assert "1 of 1 prompts look as if they held the chat template of another model" in said
    assert "hold" not in notes([ContrastPair("What is a <b>?", "Yes", "No", "x")], chatml, vector_spec())


@pytest.mark.parametrize(
    ("roles", "system", "words"),
    [
        (["user", "assistant"], None, "ends with the assistant's turn"),
        (["user", "user"], None, "in alternation"),
        (["assistant", "user"], None, "in alternation"),
        (["system"], None, "in alternation"),
        (["user", "tool", "user"], None, "in alternation"),
        (["system", "user"], "Be kind.", "brings a system turn"),
    ],
)
def test_conversations_in_another_order_are_refused(chatml, vector_spec, roles, system, words):
    turns = tuple(Turn(role, f"turn {number}") for number, role in enumerate(roles))
    with pytest.raises(InputError, match=words) as caught:
        render(turns, "Yes", chatml, vector_spec(system_prompt=system))
    assert caught.value.problems[0].found == ", ".join(roles)


def test_the_system_turn_of_a_conversation_gives_way_to_the_one_that_is_compared(chatml, vector_spec):
    turns = Turn("system", "Be brief."), Turn("user", "Hello"), Turn("assistant", "Hi"), Turn("user", "Tea?")
    (question,) = questions_with_prompt([ContrastPair(turns, "Yes", "No", "x")], chatml, vector_spec(), "Be kind.")
    text = chatml.decode(question.options[0].ids)
    assert "Be kind." in text and "Be brief." not in text
    assert "Be brief." in render(turns, "Yes", chatml, vector_spec()).text


def test_short_texts_are_not_looked_for_in_the_words_of_the_template(chatml, vector_spec):
    sides = render_sides(None, ["assistant", "rain", ""], chatml, vector_spec(chat_template=True))
    assert [side.text[side.start : side.end] for side in sides] == ["assistant", "rain", ""]
    assert len({(side.text[: side.start], side.header) for side in sides}) == 1
    headers = {render(prompt, "Yes", chatml, vector_spec()).header for prompt in ("a", "assistant", "Is it raining?")}
    assert len(headers) == 1


@pytest.mark.parametrize("answers", [("Love", "Hate"), ("love", "")])
def test_whole_texts_stand_in_one_frame_or_are_refused(chatml, vector_spec, answers):
    spec = vector_spec(chat_template=True)
    whole = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}"
    chatml.chat_template = whole
    assert [side.text for side in render_sides(None, answers, chatml, spec)] == [f"<u>{a}</u>" for a in answers]
    chatml.chat_template = whole.replace("m.content", "m.content | upper")
    with pytest.raises(InputError, match="alters the texts"):
        render_sides(None, answers, chatml, spec)
    chatml.chat_template = whole.replace("<u>", "{{ 'Long' if m.content == 'Hate' or not m.content else '' }}<u>")
    with pytest.raises(InputError, match="other words around one side"):
        render_sides(None, answers, chatml, spec)


def test_a_template_that_reads_parts_alone_gets_parts(chatml, vector_spec):
    """As those of models with images: a text would be left out without a word."""
    chatml.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    spec = vector_spec(system_prompt="Be kind.")
    text = render("Is it raining?", "Yes", chatml, spec).text
    assert text == "system: Be kind.<end>\nuser: Is it raining?<end>\nassistant: Yes"
    assert render_question("Is it raining?", chatml, vector_spec()).text == "user: Is it raining?<end>\nassistant:"


def test_a_template_that_leaves_the_prompt_out_is_refused(chatml, vector_spec):
    chatml.chat_template = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="leaves the prompt out"):
        render("Is it raining?", "Yes", chatml, vector_spec())
    render("Is it raining?", "Yes", chatml, vector_spec(chat_template=False))


@pytest.mark.parametrize(
    ("prompt", "system"), [("Is it?", "/no_think"), ("Is it?", "Be kind. /no_think"), ("Is it? /no_think", None)]
)
def test_a_word_that_a_template_takes_out_is_not_missed(chatml, vector_spec, prompt, system):
    chatml.chat_template = SWITCHED_BY_WORDS
    spec = vector_spec(system_prompt=system)
    assert "no_think" not in render(prompt, "Yes", chatml, spec).text
    asked = render_question(prompt, chatml, spec).text
    assert "no_think" not in asked and asked.endswith("<think></think>")
    assert chatml.decode(conversation_ids([{"role": "user", "content": prompt}], system, chatml)) == asked
    # A template that does not know the word has left it out without a reason.
    chatml.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content.split(' /')[0] }}:{% endfor %}"
    with pytest.raises(InputError, match=r"takes no system prompt|leaves the prompt out"):
        render(prompt, "Yes", chatml, vector_spec(system_prompt=system))


def test_a_template_in_the_file_of_a_processor_is_told(tmp_path, chatml, vector_spec):
    chatml.chat_template = None
    chatml.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": LLAMA_3}))
    pair = ContrastPair("Hello", "Yes", "No", "x")
    said = notes([pair], load_tokenizer(tmp_path), vector_spec())
    assert "prompts are used as plain text; chat_template.json" in said and "chat_template.jinja" in said
    template = json.loads((tmp_path / "chat_template.json").read_text())["chat_template"]
    (tmp_path / "chat_template.jinja").write_text(template)
    assert "used as plain text" not in notes([pair], load_tokenizer(tmp_path), vector_spec())


def test_a_tokenizer_with_several_templates_uses_the_default_one(chatml, vector_spec):
    chatml.chat_template = {"default": LLAMA_3, "tool_use": QWEN3}
    assert "28 Nov 2026" in render("Q?", "Yes", chatml, vector_spec(template_date="2026-11-28")).text
    assert thinking_switches(chatml) == [] and writes_date(chatml, vector_spec())
    chatml.chat_template = {"tool_use": QWEN3}
    with pytest.raises(InputError, match="cannot render this conversation"):
        render("Q?", "Yes", chatml, vector_spec())


def test_a_template_that_fails_ends_no_turn(tmp_path):
    class Model:
        config = generation_config = type("Config", (), {"eos_token_id": 2})()

    class Broken:
        chat_template, eos_token_id, pad_token_id = "{{ 1 / 0 }}", 2, 0

        def apply_chat_template(self, *_args, **_options):
            return 1 / 0

    assert ending_tokens(Model(), Broken()) == {0, 2}


def test_a_system_turn_that_only_the_last_turn_brings_stands_before_answers_too(chatml, vector_spec):
    chatml.chat_template = LAST_SYSTEM
    for system, front in (("Be kind.", "[INST]Be kind.\n\nHow?[/INST]"), (None, "[INST]How?[/INST]")):
        spec = vector_spec(system_prompt=system)
        assert render("How?", "Well", chatml, spec).text.endswith(f"{front}Well")
        assert render_question("How?", chatml, spec).text.endswith(front)


def test_a_template_that_takes_lists_of_parts_is_given_such(chatml, vector_spec):
    chatml.chat_template = PARTS
    found = render("How?", "Well", chatml, vector_spec(system_prompt="Be kind."))
    assert found.text == "SYSTEM: Be kind. USER: How? ASSISTANT: Well" and found.header == " ASSISTANT: "
    chat = [{"role": "user", "content": "How?"}]
    assert chatml.decode(conversation_ids(chat, None, chatml)).endswith("USER: How? ASSISTANT:")
    pair = ContrastPair("How?", "Well", "Ill", "x")
    assert "list" not in notes([pair], chatml, vector_spec())


def test_a_template_that_reads_texts_and_parts_otherwise_is_told_of(chatml, vector_spec):
    chatml.chat_template = EITHER
    assert render("How?", "Well", chatml, vector_spec()).text == "user:How?;assistant:Well"
    pair = ContrastPair("How?", "Well", "Ill", "x")
    assert "writes a text otherwise than a list" in notes([pair], chatml, vector_spec())
    for plain in (LLAMA_3, QWEN3):
        chatml.chat_template = plain
        assert "otherwise than a list" not in notes([pair], chatml, vector_spec())
