"""Ids, special tokens, where the continuation starts, and which token is read."""

from __future__ import annotations

import pytest

from patcher.errors import InputError
from patcher.pairs.pair import ContrastPair, TokenisedPair, TokenisedSide
from patcher.pairs.prompts import NO_TEMPLATE_NOTE
from patcher.pairs.tokens import tokenise_continuation, tokenise_pairs

QUESTION = "Do you consent to this change?\n\nChoices:\n (A) I do not consent\n (B) I consent"


def pair(positive: str, negative: str, prompt: str | None = None, origin: str = "p.jsonl:1", **more) -> ContrastPair:
    return ContrastPair(prompt, positive, negative, origin, **more)


def ab(positive: str = " (B)", negative: str = " (A)", prompt: str = QUESTION) -> ContrastPair:
    return pair(positive, negative, prompt, choices=(" (A)", " (B)"), format="ab")


def tokenise(given: ContrastPair, tokenizer, spec) -> TokenisedPair:
    """The pair as one of two, so that it is not taken for ActAdd's single pair and padded."""
    tokenised, _ = tokenise_pairs([given, given], tokenizer, spec)
    assert tokenised[0] == tokenised[1]
    return tokenised[0]


def read(side: TokenisedSide, tokenizer) -> list[str]:
    return [tokenizer.decode([side.ids[index]]) for index in side.read]


def continued(side: TokenisedSide, tokenizer) -> str:
    return tokenizer.decode(list(side.ids[side.continuation_start :]))


def problems(pairs: list[ContrastPair], tokenizer, spec):
    with pytest.raises(InputError) as caught:
        tokenise_pairs(pairs, tokenizer, spec)
    return caught.value.problems


ALL = ["gpt2_like", "bos_eos", "no_bos", "llama_like", "llama_chat", "chatml", "slow"]


@pytest.mark.parametrize("kind", ALL)
def test_letters_are_read_at_the_letter(kind, request, vector_spec):
    tokenizer = request.getfixturevalue(kind)
    tokenised = tokenise(ab(), tokenizer, vector_spec())
    # Some vocabularies hold "(A" as one token; none may read at the bracket that follows.
    assert [text.lstrip(" (") for text in read(tokenised.positive, tokenizer)] == ["B"]
    assert [text.lstrip(" (") for text in read(tokenised.negative, tokenizer)] == ["A"]
    assert continued(tokenised.positive, tokenizer).endswith("(B)")
    assert (
        tokenised.positive.ids[: tokenised.positive.continuation_start]
        == (tokenised.negative.ids[: tokenised.negative.continuation_start])
    )
    assert tokenised.origin == "p.jsonl:1"


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "answer", [" Yes", "Yes", " 42", " antidisestablishment", " Żółć", " é", " 是的", " Yes!?", "\nYes\n"]
)
def test_an_answer_of_several_tokens_is_read_at_its_last(kind, answer, request, vector_spec):
    tokenizer = request.getfixturevalue(kind)
    side = tokenise(pair(answer, " no", "Answer:"), tokenizer, vector_spec(position="answer")).positive
    (index,) = side.read
    word = answer.strip().rstrip("!?")
    before, after = tokenizer.decode(list(side.ids[:index])), tokenizer.decode(list(side.ids[: index + 1]))
    assert after.endswith(word)
    assert not before.endswith(word)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("chat", [True, False])
def test_continuations_are_tokenised_as_pairs_are(kind, chat, request, vector_spec):
    tokenizer = request.getfixturevalue(kind)
    spec = vector_spec(chat_template=chat and bool(tokenizer.chat_template))
    side = tokenise(ab(), tokenizer, spec).positive
    assert tokenise_continuation(QUESTION, " (B)", tokenizer, spec) == (side.ids, side.continuation_start)


def test_plain_text_gets_the_special_tokens_the_tokenizer_adds_at_the_front(
    gpt2_like, bos_eos, llama_like, vector_spec
):
    given = pair("Love", "Hate")
    assert tokenise(given, gpt2_like, vector_spec()).positive.ids == tuple(gpt2_like("Love").input_ids)
    side = tokenise(given, bos_eos, vector_spec()).positive
    assert side.ids == tuple(bos_eos("Love").input_ids[:-1])
    assert side.continuation_start == 1
    assert tokenise(given, llama_like, vector_spec()).positive.ids == tuple(llama_like("Love").input_ids)


def test_eos_is_left_out_and_noted_once(bos_eos, gpt2_like, vector_spec):
    pairs = [pair("Love", "Hate"), pair("Anger", "Calm")]
    tokenised, notes = tokenise_pairs(pairs, bos_eos, vector_spec())
    assert all(bos_eos.eos_token_id not in side.ids for one in tokenised for side in (one.positive, one.negative))
    assert len(notes) == 1
    assert "left out" in notes[0]
    assert tokenise_pairs(pairs, gpt2_like, vector_spec())[1] == []


def test_a_missing_template_is_noted_once_and_only_for_prompts(gpt2_like, chatml, vector_spec):
    assert tokenise_pairs([ab(), ab()], gpt2_like, vector_spec())[1] == [NO_TEMPLATE_NOTE]
    assert tokenise_pairs([ab()], gpt2_like, vector_spec(chat_template=False))[1] == []
    assert tokenise_pairs([ab()], chatml, vector_spec())[1] == []
    assert tokenise_pairs([pair("Love", "Hate")], gpt2_like, vector_spec())[1] == []


@pytest.mark.parametrize("kind", ["gpt2_like", "bos_eos", "llama_like", "chatml"])
def test_add_bos_can_be_forced_either_way_in_plain_text(kind, request, vector_spec):
    tokenizer = request.getfixturevalue(kind)
    bos, given = tokenizer.bos_token_id, pair("Love", "Hate")
    with_bos = tokenise(given, tokenizer, vector_spec(add_bos=True)).positive
    without = tokenise(given, tokenizer, vector_spec(add_bos=False)).positive
    assert with_bos.ids == (bos, *without.ids)
    assert bos not in without.ids
    assert (with_bos.continuation_start, without.continuation_start) == (1, 0)


def test_there_are_never_two_bos(bos_eos, llama_chat, vector_spec):
    side = tokenise(pair("<bos><bos>Love", "<bos>Hate"), bos_eos, vector_spec(add_bos=True, position="mean")).positive
    assert side.ids.count(bos_eos.bos_token_id) == 1
    assert side.continuation_start == 1
    for add_bos in ("auto", True):
        side = tokenise(ab(), llama_chat, vector_spec(add_bos=add_bos)).positive
        assert side.ids.count(llama_chat.bos_token_id) == 1
        assert side.ids[0] == llama_chat.bos_token_id


def test_bos_and_templates(llama_chat, chatml, vector_spec):
    side = tokenise(ab(), llama_chat, vector_spec(add_bos=False)).positive
    assert llama_chat.bos_token_id not in side.ids
    assert chatml.bos_token_id not in tokenise(ab(), chatml, vector_spec()).positive.ids
    side = tokenise(ab(), chatml, vector_spec(add_bos=True)).positive
    assert side.ids[0] == chatml.bos_token_id
    assert continued(side, chatml) == "(B)"


def test_a_tokenizer_without_bos_cannot_add_one(no_bos, vector_spec):
    with pytest.raises(InputError, match="no beginning-of-text token") as caught:
        tokenise_pairs([ab()], no_bos, vector_spec(add_bos=True))
    assert "add_bos: auto" in str(caught.value)


@pytest.mark.parametrize("kind", ["chatml", "llama_chat"])
def test_no_end_of_turn_follows_an_answer(kind, request, vector_spec):
    tokenizer = request.getfixturevalue(kind)
    side = tokenise(ab(), tokenizer, vector_spec(position="last")).positive
    assert read(side, tokenizer) == [")"]


def test_the_continuation_start_allows_for_merges_across_the_boundary(llama_like, vector_spec):
    side = tokenise(pair(" Yes", " No", "Answer:"), llama_like, vector_spec(position="mean")).positive
    tokens = llama_like.convert_ids_to_tokens(list(side.ids))
    assert llama_like.convert_ids_to_tokens(llama_like("Answer:").input_ids)[-1] == ":"
    assert tokens[side.continuation_start].startswith(":▁")
    assert side.continuation_start == len(llama_like("Answer:").input_ids) - 1
    assert side.read == tuple(range(side.continuation_start, len(side.ids)))


def test_positions(gpt2_like, vector_spec):
    given = pair("I talk about weddings", "We do not talk about weddings")
    length = len(gpt2_like("I talk about weddings").input_ids)

    def positions(position: object, **more: object) -> tuple[int, ...]:
        return tokenise(given, gpt2_like, vector_spec(position=position, **more)).positive.read

    assert positions("last") == positions("auto") == positions(-1) == (length - 1,)
    assert positions("mean") == tuple(range(length))
    assert positions("mean", add_bos=True) == tuple(range(1, length + 1))
    assert positions("answer", add_bos=True) == (1,)
    assert positions(1) == positions(1 - length) == (1,)


def test_mean_covers_the_continuation_only(chatml, vector_spec):
    side = tokenise(pair(" I consent", " No", QUESTION), chatml, vector_spec(position="mean")).positive
    assert "".join(read(side, chatml)) == "I consent"


def test_a_plain_system_prompt_is_not_part_of_a_whole_text(gpt2_like, vector_spec):
    spec = vector_spec(system_prompt="You are a helpful assistant.", position="mean")
    side = tokenise(pair("Love", "Hate"), gpt2_like, spec).positive
    assert "".join(read(side, gpt2_like)) == "Love"


def test_a_whole_text_through_a_template(chatml, vector_spec):
    spec = vector_spec(chat_template=True)
    side = tokenise(pair("Love", "Hate"), chatml, spec).positive
    assert side.continuation_start == 0
    assert chatml.decode(list(side.ids)).endswith("<|im_start|>assistant\n")
    assert side.read == (len(side.ids) - 1,)
    side = tokenise(pair("Love", "Hate"), chatml, vector_spec(chat_template=True, position="answer")).positive
    assert "Love".endswith(read(side, chatml)[0])


def test_positions_out_of_range_name_the_row(gpt2_like, vector_spec):
    pairs = [pair("Love and hate and calm", "I talk about weddings", origin="p:1"), pair("x", "y", origin="p:2")]
    (problem,) = problems(pairs, gpt2_like, vector_spec(position=-3))
    assert problem.where == "p:2"
    assert problem.found == "the positive side has 1 tokens"
    assert problem.remedy == "use a position from -1 to 0"
    assert problems([pairs[1]], gpt2_like, vector_spec(position=1, align="none"))


def test_identical_sides_are_all_named(gpt2_like, vector_spec):
    same = [pair("Love", "Love", origin=f"p:{index}") for index in range(12)]
    found = problems([*same, pair("Love", "Hate")], gpt2_like, vector_spec())
    assert [problem.where for problem in found[:10]] == [f"p:{index}" for index in range(10)]
    assert "same tokens" in found[0].message
    assert found[10].message == "and 2 more like these"


def test_sides_that_differ_only_after_the_token_read(gpt2_like, vector_spec):
    (problem,) = problems([pair("Love and hate", "Love and calm")], gpt2_like, vector_spec(position=0))
    assert "same up to the token that is read" in problem.message
    assert "position 0: token 0" in (problem.found or "")
    assert tokenise(pair("Love and hate", "Love and calm"), gpt2_like, vector_spec(position=-1))


def test_answers_without_letters_or_digits(gpt2_like, vector_spec):
    (problem,) = problems([pair(" !?", " Yes", "Answer:")], gpt2_like, vector_spec(position="answer"))
    assert "no letter or digit" in problem.message
    assert problem.found == "' !?'"
    assert problem.remedy == "set `position: last`"


def test_an_empty_continuation_of_a_prompt(gpt2_like, vector_spec):
    given = pair("", " Yes", "Answer:")
    side = tokenise(given, gpt2_like, vector_spec()).positive
    assert side.ids == tuple(gpt2_like("Answer:").input_ids)
    (problem,) = problems([given], gpt2_like, vector_spec(position="mean"))
    assert "no token to take the mean over" in problem.message


def test_unknown_words_may_swallow_the_boundary(vector_spec):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "Yes": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    ids, start = tokenise_continuation("什", "么", tokenizer, vector_spec(chat_template=False))
    assert ids[start:] == (0,)
    ids, start = tokenise_continuation("什-", "-", tokenizer, vector_spec(chat_template=False))
    assert start < len(ids)


def test_a_real_sentencepiece_file(tmp_path, vector_spec):
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import LlamaTokenizer

    (tmp_path / "text.txt").write_text(
        "\n".join(["yes and no (A) (B)", "I consent to this change", "Answer: Yes No"] * 9)
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=True,
        minloglevel=2,
    )
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path, add_bos_token=True)
    tokenised = tokenise(ab(), tokenizer, vector_spec())
    assert tokenised.positive.ids[0] == tokenizer.bos_token_id
    assert read(tokenised.positive, tokenizer) == ["B"]
