"""What takes long: whole machines under QEMU, collected where the cache has QEMU and a kernel for them, and cards of their own to compile.

``make nightly`` sees to the former and asks for the latter.
"""

import os

from ringwall.sim.linux import kernel

collect_ignore = [*([] if kernel.cached("amd64") else ["test_qemu.py"]), *([] if os.environ.get("RINGWALL_NIGHTLY") else ["test_vf.py"])]
