"""The command that starts QEMU, without starting it; what it does is in tests/nightly."""

import json

import pytest

from ringwall.sim.linux import qemu


def command(**how):
    return qemu.command(["qemu"], ["/a/one", "/a/two"], linux="/k", image="/i", **how)


@pytest.mark.parametrize("arch", qemu.ARCHITECTURES)
def test_command(arch):
    """LINUX-QEMU-5: the command has a slot and a device per socket, memory that can be shared, the IOMMU; the guest's clock is not ours."""
    made = command(arch=arch, memory_mb=300, words=("job=tour",))
    devices = [made[n + 1] for n, word in enumerate(made) if word == "-device"]
    ours = [json.loads(device) for device in devices if device.startswith("{")]
    assert [device["socket"]["path"] for device in ours] == ["/a/one", "/a/two"]
    assert [device.partition(",")[0] for device in devices if "{" not in device] == ["pcie-root-port"] * 2
    assert [device["bus"] for device in ours] == ["slot0", "slot1"]
    assert "memory-backend-memfd,id=memory,size=300M,share=on" in made
    assert "memory-backend=memory" in made[made.index("-machine") + 1]
    assert made[made.index("-append") + 1].split()[-1] == "job=tour"
    assert ("-icount" in made, "-no-reboot" in made) == (True, True)
    prompt = command(arch=arch, prompt=True, reboots=True)
    assert ("-icount" in prompt, "-no-reboot" in prompt) == (False, False)
    assert "virtio-iommu-pci" in command(arch=arch, iommu="virtio")


def test_refusals():
    """LINUX-QEMU-6: a machine that there is not is refused with a sentence."""
    assert "intel_iommu=on" in command(iommu="intel")[-1]
    for how, sentence in (({"arch": "sparc"}, "not 'sparc'"), ({"iommu": "amd"}, "not 'amd'"), ({"memory_mb": 32}, "not 32"),
                          ({"arch": "riscv64", "iommu": "intel"}, "not 'riscv64'"), ({"memory_mb": "96"}, "not '96'")):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            command(**how)
