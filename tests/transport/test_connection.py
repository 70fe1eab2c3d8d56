"""An asyncio connection of frames, over real sockets."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from serve.messages import Abort
from serve.transport.address import Address
from serve.transport.connection import Connection, dial, listen

_decoder = msgspec.msgpack.Decoder(Abort)


def _run(tmp_path: Path, *, is_closed_at_once: bool) -> list[str]:
    """What both ends of one connection saw: two messages are sent to a server that closes."""
    seen: list[str] = []

    def on_message(connection: Connection, message: Abort) -> None:
        seen.append(f"got {message.stream_id}")
        connection.close()

    def accept() -> Connection:
        connection = Connection(_decoder, on_message, lambda _: seen.append("server lost"))
        if is_closed_at_once:
            connection.close()
        return connection

    async def main() -> None:
        server, address = await listen(Address(path=str(tmp_path / "s")), accept)
        is_lost = asyncio.Event()
        caller = await dial(
            str(address), lambda: Connection(_decoder, on_message, lambda _: is_lost.set())
        )
        caller.send(Abort(1))
        caller.send(Abort(2))
        async with asyncio.timeout(60):
            await is_lost.wait()
        caller.send(Abort(3))
        server.close()
        await asyncio.sleep(0)

    asyncio.run(main())
    return seen


def test_a_connection_that_is_closed_gives_no_more_messages_and_is_lost_once(
    tmp_path: Path,
) -> None:
    assert _run(tmp_path, is_closed_at_once=False) == ["got 1", "server lost"]


def test_a_connection_that_is_closed_before_it_is_made_ends_on_both_sides(tmp_path: Path) -> None:
    assert _run(tmp_path, is_closed_at_once=True) == ["server lost"]


def test_a_dial_tries_every_address_and_names_them_all(tmp_path: Path) -> None:
    async def main() -> None:
        await dial(
            f"unix:{tmp_path}/none,tcp:127.0.0.1:9",
            lambda: Connection(_decoder, lambda *_: None, lambda _: None),
        )

    with pytest.raises(ConnectionRefusedError, match=r"unix:.*none.*; tcp:127\.0\.0\.1:9"):
        asyncio.run(main())
