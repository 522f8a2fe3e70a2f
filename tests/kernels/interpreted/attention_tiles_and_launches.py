"""For tests of the attention kernels alone: the tiles they have, and how they are launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from fastattn import use_backend
from tests.ops.backends import Backend

BACKEND = Backend("triton", "interpreted")


@pytest.fixture
def by_the_attention_kernels(larger_tiles: None) -> Iterator[None]:
    """No call falls back to another backend unless a test asks for one."""
    with use_backend(attention="triton", attention_packed="triton"):
        yield


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``tiles(BLOCK_M, BLOCK_N)`` sets those of every kernel; whole: backward is one kernel."""
    from fastattn.kernels import attention as kernels
    from fastattn.kernels.attention_configs import Config

    def set_tiles(block_m: int, block_n: int, whole: bool = False, **by_kernel: Any) -> None:
        def choose(kernel: str, *_: Any) -> Config:
            sizes = by_kernel.get(kernel.replace(" ", "_"), (block_m, block_n))
            return Config(*sizes, num_warps=4, num_stages=1)

        config = Config(block_m, block_n, num_warps=4, num_stages=1)
        monkeypatch.setattr(kernels, "choose", choose)
        monkeypatch.setattr(kernels, "choose_whole_pass", lambda *_: config if whole else None)

    return set_tiles


class Launched(NamedTuple):
    name: str
    arguments: dict[str, Any]


class Recorder(NamedTuple):
    """A kernel that writes down how it is launched."""

    name: str
    kernel: Any
    launches: list[Launched]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            positional = dict(zip(self.kernel.arg_names, args, strict=False))
            self.launches.append(Launched(self.name, positional | kwargs))
            self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """The launches of attention kernels in this test, in order."""
    from fastattn.kernels import attention as kernels

    recorded: list[Launched] = []
    for name in ("forward", "query_gradient", "key_gradient", "mask_gradient"):
        recorder = Recorder(name, getattr(kernels, f"attention_{name}_kernel"), recorded)
        monkeypatch.setattr(kernels, f"attention_{name}_kernel", recorder)
    return recorded


def names(launches: list[Launched]) -> list[str]:
    return [launch.name for launch in launches]
