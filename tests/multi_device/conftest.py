"""Tests here need 8 devices. The number is fixed when JAX starts, so they run in a process of their own:

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/multi_device
"""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def eight_devices():
    import jax

    if jax.device_count() < 8:
        pytest.skip(
            f"needs 8 devices, there are {jax.device_count()}: set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8 and run tests/multi_device by itself"
        )
    return jax.devices()[:8]
