"""A GGUF model in several files, as llama.cpp's gguf-split makes them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from patcher.checkpoint.gguf.model import split_name


def split(source: Path, count: int, *, empty_first: bool = False) -> Path:
    """The same model in several files, as llama.cpp's gguf-split makes them."""
    reader = gguf.GGUFReader(source)
    groups = np.array_split(np.arange(len(reader.tensors)), count - empty_first)
    if empty_first:
        groups = [np.array([], int), *groups]
    for number, group in enumerate(groups):
        writer = gguf.GGUFWriter(split_name(source, number, count), "?")
        if number == 0:
            for key, field in reader.fields.items():
                if key.startswith("GGUF."):
                    continue
                kind = field.types[0]
                sub = field.types[1] if kind == gguf.GGUFValueType.ARRAY else None
                if key in writer.kv_data[0]:
                    del writer.kv_data[0][key]
                writer.add_key_value(key, field.contents(), kind, sub)
        else:
            writer.kv_data[0].clear()
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for place in group:
            tensor = reader.tensors[place]
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return split_name(source, 0, count)
