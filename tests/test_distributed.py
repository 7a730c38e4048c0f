"""What a process says where the others that it was started with do not come."""

import socket

import pytest

from spikelm import distributed
from spikelm.errors import SpikelmError


@pytest.mark.parametrize("rank", [0, 1], ids=["the one that waits", "one that asks"])
def test_a_process_whose_others_do_not_come_says_so(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port = listening.getsockname()[1]
    launched = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in (launched | {distributed.COLLECTIVE_TIMEOUT: 1}).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SpikelmError, match=f"^rank {rank} cannot join .* localhost:{port} .*imed out.*_TIMEOUT=1 is"):
        distributed.start()
    assert distributed._Watch.current is None


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        listening.listen()
        port = listening.getsockname()[1]
        launched = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in launched.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SpikelmError, match=f"rank 0 cannot join .* localhost:{port} .*EADDRINUSE"):
            distributed.start()
