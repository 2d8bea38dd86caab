"""The compiler's artifacts of these tests go to a folder of their own."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _artifacts(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdms.runner.ARTIFACTS", tmp_path_factory.mktemp("artifacts"))
        yield
