"""Asynchronous functions of users, called from code that is not.

They run on one event loop in a thread of its own, the same at every step: clients that a function keeps from call to
call, and their open connections, belong to the loop that they began on. A notebook's own loop is left alone.
"""

import asyncio
import inspect
import threading

_lock = threading.Lock()
_loop = None


def awaited(value):
    """What an asynchronous function returns; values of other functions as they are.

    Args:
        value: an awaitable, or a list of them, which run side by side; or anything else.

    Returns:
        The result, or the list of results.
    """
    if not _waits(value):
        return value
    future = asyncio.run_coroutine_threadsafe(_results(value), _running_loop())
    try:
        return future.result()
    except BaseException:
        # Ctrl-C as well: nothing goes on behind the caller's back.
        future.cancel()
        raise


def _waits(value):
    if isinstance(value, (list, tuple)):
        return any(map(inspect.isawaitable, value))
    return inspect.isawaitable(value)


async def _results(value):
    if inspect.isawaitable(value):
        value = await value
    if not _waits(value):
        return value
    return list(await asyncio.gather(*map(_result, value)))


async def _result(value):
    return await value if inspect.isawaitable(value) else value


def _running_loop():
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="keras_gemma rewards", daemon=True).start()
        return _loop
