"""Ctrl-C and SIGTERM: an exception that unwinds, so that staging folders are removed, and that is not forgotten.

Destructors and the hooks of other libraries swallow exceptions, and C extensions make others of them. An interrupt that
arrives there is obeyed at the next thing that is said, or instead of the error that came of it.
"""

from __future__ import annotations

import signal

_asked = False


def heed_interrupts() -> None:
    """Take both signals as an interrupt from here on; where Ctrl-C is ignored (nohup), that stays so."""
    global _asked
    _asked = False
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def obey_interrupts() -> None:
    """Raise again what was swallowed.

    Raises:
        KeyboardInterrupt: an interrupt has arrived.
    """
    if _asked:
        raise KeyboardInterrupt


def _interrupt(_signal: int, _frame: object) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt
