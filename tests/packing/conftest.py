# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from tests.packing.datasets import COUNTS, make_index, write_videos


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Fourteen questions about four videos whose frames say which they are."""
    folder = tmp_path_factory.mktemp("index")
    write_videos(folder, COUNTS)
    return make_index(folder)
