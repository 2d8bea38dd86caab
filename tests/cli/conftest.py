"""The command line's tests see a fake model unless they open a real one themselves."""

from __future__ import annotations

import pytest

import fastdms
from tests.cli.fake_model import FakeModel


@pytest.fixture
def model(monkeypatch):
    fake = FakeModel()

    def compile(model, **options):
        fake.opened.append((model, options))
        return fake

    monkeypatch.setattr(fastdms, "compile", compile)
    monkeypatch.setattr(fastdms, "default_model", lambda: "the default model")
    return fake
