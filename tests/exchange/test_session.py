from __future__ import annotations

from pathlib import Path

import pytest

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.data.vocabulary import Vocabulary
from fedclip_flwr.exchange.session import Session, recall


def test_a_session_is_found_again_by_its_key(tmp_path: Path) -> None:
    session = Session("sketch", Vocabulary(("cat", "chien, gros"), ("a {}", "ein {}")), "0123", "run-7")
    session.remember(tmp_path)
    assert recall(session.key, tmp_path) == session
    others = [
        session._replace(holdout=""),
        session._replace(vocabulary=Vocabulary(("cat", "chien"), ("a {}", "ein {}"))),
        session._replace(model=""),
        session._replace(run="run-8"),
    ]
    assert len({session.key, *(other.key for other in others)}) == 5
    for unknown in (f"../{tmp_path.name}/session-{session.key}", "0123456789abcdef"):
        with pytest.raises(UserError, match="session not found"):
            recall(unknown, tmp_path)
    (tmp_path / f"session-{session.key}").write_text("[]")
    with pytest.raises(UserError, match="session not found"):
        recall(session.key, tmp_path)
