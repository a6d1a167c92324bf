"""Every mark that ties a test to hardware; tests take marks from here alone."""

from __future__ import annotations

import pytest

gpu = pytest.mark.gpu
