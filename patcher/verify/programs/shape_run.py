"""Load checkpoint folders on the meta device in stock transformers, in a process that cannot import this package.

It is started as ``python -I shape_run.py job.json``. The stock loader opens every weight file, matches each name and
shape with the class's own, and reports what is missing, unexpected or of another shape; no value is read. The job is
{folders: {name: path}, trust_remote_code, result}; the result {version, folders: {name: {class, loading} or {error}}}.
"""

from __future__ import annotations

import json
import os
import sys

sys.modules["patcher"] = None  # type: ignore[assignment]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from patcher.verify.programs.stock_model import loader_of
else:
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    from stock_model import loader_of


def main(job_path: str) -> None:
    import transformers

    with open(job_path, encoding="utf-8") as file:  # noqa: PTH123 - as few imports as can be
        job = json.load(file)
    found = {name: report(folder, job["trust_remote_code"]) for name, folder in job["folders"].items()}
    with open(job["result"], "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump({"version": transformers.__version__, "folders": found}, file)


def report(folder: str, trust_remote_code: bool) -> dict[str, Any]:
    """What the stock loader says of a folder."""
    try:
        model, info = loader_of(folder, trust_remote_code=trust_remote_code).from_pretrained(
            folder,
            device_map={"": "meta"},
            # Else it raises for the first, and would not list them.
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        # Classes refuse what they cannot load in their own ways, with errors of any type.
        return {"error": (str(error).strip().splitlines() or [type(error).__name__])[-1][:500]}
    loading = {key: sorted(map(str, value)) for key, value in info.items() if isinstance(value, (list, set, dict))}
    return {"class": type(model).__name__, "loading": loading}


if __name__ == "__main__":
    main(sys.argv[1])
