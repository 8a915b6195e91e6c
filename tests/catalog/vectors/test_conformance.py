"""Both ways to keep prompts' vectors do what their contract says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from kvpool.catalog.vectors.contract import PromptVectors
from kvpool.catalog.vectors.embedded import EmbeddedVectors
from kvpool.catalog.vectors.remote import RemoteVectors
from kvpool.catalog.vectors.session import SCHEMES
from kvpool.config.service import read_service
from tests.catalog.vectors.conformance import MakeVectors, VectorsConformance
from tests.catalog.vectors.qdrant_server import qdrant_server, service_folder


class TestEmbedded(VectorsConformance):
    @pytest.fixture
    def make_vectors(self, tmp_path: Path) -> Iterator[MakeVectors]:
        with ExitStack() as opened:

            def make(max_points: int) -> PromptVectors:
                return opened.enter_context(closing(EmbeddedVectors(tmp_path, max_points=max_points)))

            yield make


class TestRemote(VectorsConformance):
    @pytest.fixture
    def make_vectors(self, tmp_path: Path) -> Iterator[MakeVectors]:
        with ExitStack() as opened:
            folder = service_folder(tmp_path / "qdrant", opened.enter_context(qdrant_server()).port)

            def make(max_points: int) -> PromptVectors:
                vectors = RemoteVectors(
                    lambda: read_service(folder, schemes=SCHEMES), max_points=max_points, budget_s=20
                )
                return opened.enter_context(closing(vectors))

            yield make
