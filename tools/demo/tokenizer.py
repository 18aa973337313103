"""The demonstration's tokenizer: a small BPE in Llama's style, trained on the grammar's text.

It is written twice with the same content: `tokenizer.json` for transformers and vLLM, and `tokenizer.model`
(SentencePiece), because that is what llama.cpp's converter reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNKNOWN, BOS, EOS, PAD = SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
VOCABULARY_SIZE = 1024
_SPACE = "▁"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer; pieces never cross a word, a punctuation mark or a line break."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Punctuation()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS) - len(byte_tokens), show_progress=False
    )
    # Line breaks stay out of the alphabet, so that they become the byte token that Llama's readers expect.
    learner.train_from_iterator((line for text in texts for line in text.split("\n")), trainer)
    learnt: dict[str, Any] = json.loads(learner.to_str())["model"]
    pieces = sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)
    vocabulary = {piece: index for index, piece in enumerate([*SPECIAL_TOKENS, *byte_tokens, *pieces])}

    core = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for left, right in learnt["merges"]],
            unk_token=UNKNOWN,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        add_bos_token=True,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `tokenizer.model`."""
    tokenizer.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    # The name that every release of transformers knows.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(_as_sentencepiece(tokenizer))


def _as_sentencepiece(tokenizer: PreTrainedTokenizerFast) -> bytes:
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(tokenizer)
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.trainer_spec.pad_id = 3
    model.trainer_spec.pad_piece = PAD
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    vocabulary = tokenizer.get_vocab()
    kinds = proto.ModelProto.SentencePiece
    for index, piece in enumerate(sorted(vocabulary, key=vocabulary.__getitem__)):
        if piece == UNKNOWN:
            kind = kinds.UNKNOWN
        elif piece in SPECIAL_TOKENS:
            kind = kinds.CONTROL
        else:
            kind = kinds.BYTE if piece.startswith("<0x") else kinds.NORMAL
        # SentencePiece merges the best score first; BPE numbers its pieces in merge order.
        model.pieces.add(piece=piece, score=-float(index) if kind == kinds.NORMAL else 0.0, type=kind)
    return bytes(model.SerializeToString())
