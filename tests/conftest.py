"""One thread a process, as in CI; no test reads or writes what is kept between a user's runs."""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from collections.abc import Generator, Iterator
from fnmatch import fnmatchcase

import pytest
from support.stock_processes import StockProcesses

from patcher.disk.findings import Findings

# Nothing has imported torch yet, which looks at the first when it is loaded: tests run beside one another, and what
# they compare is computed in the same order everywhere. Who sets other values gets them, in all processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Imports make some million objects and no garbage; Python would look for it every 700.
gc.set_threshold(50_000, 5, 5)

STOCK_PROCESSES = pytest.StashKey[StockProcesses]()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell without job control starts what runs in the background, and every process that a test starts and
    # interrupts would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the test run's own."""
    before = os.environ.get("PATCH_MODEL_CACHE")
    os.environ["PATCH_MODEL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["PATCH_MODEL_CACHE"]
    else:
        os.environ["PATCH_MODEL_CACHE"] = before


ABOUT_PROOFS = {"architectures", "disk", "routes"}
"""Folders of tests of what finds it out."""


@pytest.fixture(autouse=True)
def proofs_are_made_once(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Iterator[None]:
    """What a proof found on a class is kept for the run, but not where it is tested, or a test replaces something."""
    anew = request.path.relative_to(pytestconfig.rootpath).parts[1] in ABOUT_PROOFS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Findings, "kept", not (anew or "monkeypatch" in request.fixturenames))
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``slow_but("gpt2", "llama*")``: slow in all cases but those of these ids."""
    named: dict[tuple[str, str], None] = {}
    seen = set()
    for item in items:
        for mark in item.iter_markers("slow_but"):
            test, _, case = item.nodeid.removesuffix("]").partition("[")
            quick = [wanted for wanted in mark.args if fnmatchcase(case, wanted)]
            named |= dict.fromkeys((test, wanted) for wanted in mark.args)
            seen |= {(test, wanted) for wanted in quick}
            if not quick:
                item.add_marker(pytest.mark.slow)
    if not any("::" in argument for argument in config.args):
        for test, wanted in named.keys() - seen:
            warnings.warn(pytest.PytestCollectionWarning(f"{test} has no case {wanted!r}"), stacklevel=1)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STOCK_PROCESSES] = StockProcesses(os.environ)


def pytest_collection_finish() -> None:
    """What was imported for the tests stays: no build that frees memory looks through it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[STOCK_PROCESSES].close()


@pytest.fixture(scope="session")
def stock_processes(pytestconfig: pytest.Config) -> StockProcesses:
    """Forks in the place of new interpreters, see there."""
    return pytestconfig.stash[STOCK_PROCESSES]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """Tests, and the fixtures of sessions and modules that they are the first to ask for, run forks."""
    # Where nothing has imported it, nothing is run by it; importing it here would cost every test run torch.
    stack = sys.modules.get("patcher.verify.transformers_stack")
    if stack is None:
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "run_watched", item.config.stash[STOCK_PROCESSES])
        patch.setattr("patcher.verify.warm.start", lambda: None)
        return (yield)
