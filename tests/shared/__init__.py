"""Tests of pools whose tiers are shared, on real servers."""

import pytest

pytest.register_assert_rewrite("tests.shared.scenarios")
