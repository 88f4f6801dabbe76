import functools
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # the tensors are tiny, and on a busy machine two OpenMP threads wait for each other


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    """A file of calibration text, 4 x 20 sentences."""
    from tiny import TEXT  # imports transformers, which most tests do without

    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT * 4)
    return str(path)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton was imported as an interpreter: that is decided at import, so not in this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(int).result()
    with pool:
        yield pool


@pytest.fixture
def rank(monkeypatch) -> Callable[[int, int], None]:
    """Makes this process another of vLLM's tensor-parallel ranks than the only one."""
    from ranks import become  # imports vLLM

    become(monkeypatch, 0, 1)
    return functools.partial(become, monkeypatch)


@pytest.fixture(params=[16, 8])
def width(request) -> int:
    """Of coefficients."""
    return request.param


@pytest.fixture
def stops_after_a_block(monkeypatch) -> Callable[[], AbstractContextManager]:
    """Within what it returns a run is stopped as if by Ctrl-C once its first block is done."""
    from bpdq_quantizer.run import steps  # imports transformers

    save = steps.save_progress

    @contextmanager
    def stopping() -> Iterator[None]:
        written = []

        def stop(run, *args):
            written.append(args)
            if len(written) > 1:
                raise KeyboardInterrupt
            return save(run, *args)

        with monkeypatch.context() as patch:
            patch.setattr(steps, "save_progress", stop)
            with pytest.raises(KeyboardInterrupt):
                yield

    return stopping
