"""Logits of llama.cpp under a control vector, by the library inside xllamacpp; run by a python that has it.

xllamacpp has no setting for control vectors, but it exports llama.cpp's own functions: what ``--control-vector`` does
is ``common_control_vector_load`` and then ``llama_set_adapter_cvec`` over blocks 1 to the last one (common.cpp).

Usage: python llama_cpp_vector.py '{"model": PATH, "vector": PATH or null, "ids": [...], "out": PATH}'
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys

import xllamacpp.xllamacpp as extension

LOAD = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
OLD_STRINGS = "_Z12string_stripRKSs"
"""A function that only a build with the std::string of before C++11 has, as the wheels are."""
OPAQUE = 4096
VECTOR_BYTES = 24


class Opaque(ctypes.Structure):
    """Parameters whose layout does not matter: they are only passed on. Larger than the real one does no harm."""

    _fields_ = (("content", ctypes.c_char * OPAQUE),)


class Batch(ctypes.Structure):
    _fields_ = (("n_tokens", ctypes.c_int32), ("pointers", ctypes.c_void_p * 6))


def main(job: dict) -> None:
    library = ctypes.CDLL(extension.__file__)
    library.llama_backend_init()
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(library, name).restype = Opaque
    library.llama_model_load_from_file.restype = ctypes.c_void_p
    library.llama_model_load_from_file.argtypes = (ctypes.c_char_p, Opaque)
    model = library.llama_model_load_from_file(job["model"].encode(), library.llama_model_default_params())
    assert model, "llama.cpp cannot load the model"
    library.llama_init_from_model.restype = ctypes.c_void_p
    library.llama_init_from_model.argtypes = (ctypes.c_void_p, Opaque)
    context = library.llama_init_from_model(model, library.llama_context_default_params())
    assert context, "llama.cpp cannot make a context"
    if job["vector"]:
        steer(library, model, context, job["vector"])
    library.llama_model_get_vocab.restype = ctypes.c_void_p
    library.llama_model_get_vocab.argtypes = (ctypes.c_void_p,)
    library.llama_vocab_n_tokens.argtypes = (ctypes.c_void_p,)
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    library.llama_batch_get_one.restype = Batch
    library.llama_decode.argtypes = (ctypes.c_void_p, Batch)
    library.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    library.llama_get_logits_ith.argtypes = (ctypes.c_void_p, ctypes.c_int32)
    rows = []
    for token in job["ids"]:
        one = (ctypes.c_int32 * 1)(token)
        assert library.llama_decode(context, library.llama_batch_get_one(one, 1)) == 0
        rows.append(library.llama_get_logits_ith(context, -1)[:size])
    with open(job["out"], "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump(rows, file)


def steer(library: ctypes.CDLL, model: int, context: int, path: str) -> None:
    """What common_init_from_params does with --control-vector."""
    raw = path.encode()
    if hasattr(library, OLD_STRINGS):
        # Length, capacity and owners lie before the text, and the string is a pointer to the text.
        text = ctypes.create_string_buffer(struct.pack("<QQQ", len(raw), len(raw), 1) + raw)
        string = struct.pack("<Q", ctypes.addressof(text) + 24)
    else:
        text = ctypes.create_string_buffer(raw)
        string = struct.pack("<QQQQ", ctypes.addressof(text), len(raw), len(raw), 0)
    # struct { float strength; std::string fname; }
    info = ctypes.create_string_buffer(struct.pack("<fi", 1.0, 0) + string)
    start, size = ctypes.addressof(info), 8 + len(string)
    infos = (ctypes.c_void_p * 3)(start, start + size, start + size)
    # struct { int n_embd; std::vector<float> data; }, returned through a hidden first argument.
    loaded = ctypes.create_string_buffer(8 + VECTOR_BYTES)
    load = getattr(library, LOAD)
    load.restype = ctypes.c_void_p
    load.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    load(ctypes.addressof(loaded), ctypes.addressof(infos))
    width = ctypes.c_int32.from_buffer(loaded, 0).value
    assert width > 0, "llama.cpp refuses the control vector"
    begin, end = (ctypes.c_void_p.from_buffer(loaded, 8 + 8 * place).value or 0 for place in (0, 1))
    library.llama_set_adapter_cvec.argtypes = (
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32
    )  # fmt: skip
    library.llama_model_n_layer.argtypes = (ctypes.c_void_p,)
    last = library.llama_model_n_layer(model)
    assert library.llama_set_adapter_cvec(context, begin, (end - begin) // 4, width, 1, last) == 0


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
