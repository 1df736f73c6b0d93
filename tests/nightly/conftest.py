"""What takes long: whole machines under QEMU, collected where the cache has QEMU and a kernel for them; and where ``make nightly`` asks
for them, cards of their own to compile or to map to an FPGA, and ten million requests.

``make nightly`` sees to the former and asks for the latter.
"""

import os

from ringwall.sim.linux import kernel

collect_ignore = []
if not kernel.cached("amd64"):
    collect_ignore.append("test_qemu.py")
if not os.environ.get("RINGWALL_NIGHTLY"):
    collect_ignore += ["test_lockstep.py", "test_vf.py", "test_boards.py"]
