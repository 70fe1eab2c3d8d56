"""The one question that `shoal up --ask` puts to the first model, with a key where one is needed.

Not a conversation (`shoal chat`). A key that is missing or wrong is told before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.access import Access
    from cluster.local.interrupts import Interrupts
    from cluster.local.supervisor import Deployment

FIRST_QUESTION = "What is Shoal?"
_ANSWER_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Question:
    """The question with the key that it is asked with."""

    api_key: str | None

    @classmethod
    def prepare(cls, access: Access, key_file: Path | None) -> Question:
        """Choose the key: the one that was just made, else the user's own.

        Raises:
            DeniedError: the server will need a key, and there is none that it knows.
        """
        from cluster.chat import denied
        from cluster.keys import own_key
        from serve.keys import KeyRing

        if access.http.keys_file is None:
            return cls(None)
        api_key = access.new_key or own_key(key_file)
        if api_key is None or KeyRing(access.http.keys_file).find(api_key) is None:
            raise denied(has_key=api_key is not None)
        return cls(api_key)

    def ask(self, console: Console, deployment: Deployment, interrupts: Interrupts) -> None:
        """Print the answer as it streams; a signal ends it."""
        from cluster.chat import AnswerStream, Message

        console.print(f"\n[bold]You[/bold]    {FIRST_QUESTION}\n[bold]Shoal[/bold]  ", end="")
        with AnswerStream(
            deployment.contact_host,
            deployment.port,
            [Message("user", FIRST_QUESTION)],
            model=deployment.models[0],
            max_tokens=_ANSWER_TOKENS,
            api_key=self.api_key,
        ) as answer:
            for piece in answer:
                console.print(piece, end="", markup=False)
                if interrupts.num_received:
                    break
        console.print("\n")
