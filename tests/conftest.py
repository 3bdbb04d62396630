"""Every test runs with shapes and types checked at each call."""

import os

# Several workers share two cores: idle threads must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

_hook = install_import_hook("longspan", "beartype.beartype")
