"""Logits of llama.cpp at every position, with or without a control vector; run by a python that has xllamacpp.

xllamacpp has no setting for control vectors, but it exports llama.cpp's own functions.

Usage: python gguf_logits.py JOBS.json, where a job is {"model": PATH, "vectors": {BLOCK: [numbers]}, "ids": [...]};
prints a list with {"logits": [[...], ...]} or {"error": text} for each.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import xllamacpp.xllamacpp as extension


class Opaque(ctypes.Structure):
    """Parameters whose layout does not matter: they are only passed on. Larger than the real one does no harm."""

    _fields_ = (("content", ctypes.c_char * 4096),)


class Batch(ctypes.Structure):
    _fields_ = (("n_tokens", ctypes.c_int32), ("pointers", ctypes.c_void_p * 6))


library = ctypes.CDLL(extension.__file__)
POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int32
for name, result, arguments in (
    ("llama_model_default_params", Opaque, ()),
    ("llama_context_default_params", Opaque, ()),
    ("llama_model_load_from_file", POINTER, (ctypes.c_char_p, Opaque)),
    ("llama_init_from_model", POINTER, (POINTER, Opaque)),
    ("llama_model_get_vocab", POINTER, (POINTER,)),
    ("llama_vocab_n_tokens", NUMBER, (POINTER,)),
    ("llama_batch_get_one", Batch, (POINTER, NUMBER)),
    ("llama_decode", NUMBER, (POINTER, Batch)),
    ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), (POINTER, NUMBER)),
    ("llama_model_n_layer", NUMBER, (POINTER,)),
    ("llama_set_adapter_cvec", NUMBER, (POINTER, POINTER, ctypes.c_size_t, NUMBER, NUMBER, NUMBER)),
    ("llama_free", None, (POINTER,)),
    ("llama_model_free", None, (POINTER,)),
):
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments


def exact_context_params() -> Opaque:
    """The defaults, but with fp32 instead of half precision in the cache, and no flash attention."""
    params = library.llama_context_default_params()
    words = (NUMBER * 64).from_buffer(params)
    # type_k and type_v, both half precision (1), come after two pointers that are null; flash_attn_type (auto: -1) is
    # thirteen words before.
    places = [n for n in range(14, 40) if list(words[n - 4 : n + 2]) == [0, 0, 0, 0, 1, 1] and words[n - 13] == -1]
    assert len(places) == 1, "llama.cpp's parameters have changed"
    words[places[0]] = words[places[0] + 1] = words[places[0] - 13] = 0
    return params


def run(job: dict) -> dict:
    model = library.llama_model_load_from_file(job["model"].encode(), library.llama_model_default_params())
    if not model:
        return {"error": "llama.cpp cannot load the model"}
    context = library.llama_init_from_model(model, exact_context_params())
    if not context:
        return {"error": "llama.cpp cannot make a context"}
    vectors = {int(block): values for block, values in (job.get("vectors") or {}).items()}
    if vectors:
        width, last = len(next(iter(vectors.values()))), library.llama_model_n_layer(model)
        # Block 0 has none: the numbers begin with block 1's.
        data = (ctypes.c_float * (width * (last - 1)))()
        for block, values in vectors.items():
            data[width * (block - 1) : width * block] = values
        assert library.llama_set_adapter_cvec(context, data, len(data), width, 1, last) == 0
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    rows = []
    for token in job["ids"]:
        one = (NUMBER * 1)(token)
        if library.llama_decode(context, library.llama_batch_get_one(one, 1)) != 0:
            return {"error": "llama.cpp cannot decode"}
        rows.append(library.llama_get_logits_ith(context, -1)[:size])
    library.llama_free(context)
    library.llama_model_free(model)
    return {"logits": rows}


library.llama_backend_init()
print(json.dumps([run(job) for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]))
