from __future__ import annotations

import pytest

ALL = "conformance_all"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{ALL}: every architecture of transformers; only with -m {ALL}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ALL in str(config.getoption("markexpr")):
        return
    for item in items:
        if item.get_closest_marker(ALL):
            item.add_marker(pytest.mark.skip(reason=f"takes ten minutes: -m {ALL}"))
