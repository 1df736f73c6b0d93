"""Debian's own kernels in QEMU drive the compiled card over vfio-user."""

import os
import re
import time
from collections import Counter

import pytest

from ringwall.models.events import TlpReceived
from ringwall.models.iommu.faults import Cause
from ringwall.models.tlp import TlpType
from ringwall.rtl.config import BlkConfig, EndpointConfig, IommuConfig, VirtioIommuConfig
from ringwall.sim.card import bench_config
from ringwall.sim.linux import initramfs, kernel, module, qemu
from ringwall.sim.linux.main import Session
from ringwall.sim.linux.vfio_user import Server

from ..linux import misaimed
from ..linux.table_watch import TableWatch
from ..linux.wall_watch import WallWatch

CONFIG = bench_config(64)
WITH_IOMMU = EndpointConfig(width=64, iommu=VirtioIommuConfig(), disks=(BlkConfig(), BlkConfig()), completion_timeout_cycles=10_000)
RISCV = EndpointConfig(width=64, iommu=IommuConfig(vendor_id=0x1B36, device_id=0x0014), disks=(BlkConfig(), BlkConfig()),
                       completion_timeout_cycles=10_000)  # fmt: skip
DISKS = (1, 2)
MACHINES = [(arch, iommu) for arch in qemu.ARCHITECTURES if kernel.cached(arch)
            for iommu in (("none", "intel", "virtio") if arch == "amd64" else ("none",))]  # fmt: skip
IS_NIGHTLY = bool(os.environ.get("RINGWALL_NIGHTLY"))


class Machine:
    """A card, its servers, and guests one after the other, golden model watching."""

    def __init__(self, folder, config=CONFIG, *, functions=None, **parameters):
        self.folder, self.session = folder, Session(config, latency=20, jitter=30, split="random", **parameters)
        self.card, self.bridge = self.session.card, self.session.bridge
        self.servers = [Server(self.session.loop, self.bridge, folder / f"function{n}", n) for n in functions or self.session.disks]

    def run(self, job, *, arch="amd64", iommu="none", words=(), timeout_s=500, more=(), **how):
        linux, modules = kernel.debian(arch)
        return qemu.run(self.session.loop, [server.path for server in self.servers], emulator=kernel.qemu(arch), linux=linux,
                        image=initramfs.build(modules=[*modules, *more], arch=arch), job=job, folder=self.folder, arch=arch, iommu=iommu,
                        words=["quiet", *words], timeout_s=timeout_s, **how)  # fmt: skip

    def settle(self):
        assert self.session.loop.run(until=lambda: not any(server.is_connected for server in self.servers), timeout_s=20)

    def close(self):
        for server in self.servers:
            server.close()
        self.session.close()


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    machine.close()


def check(run, machine):
    """The job ended well, no server refused anything, no DMA of the card went beside what was mapped, the model had requests to judge."""
    assert machine.session.judge.requests > 20
    assert run.is_good, f"{run.problem or run.status}\n" + "\n".join(run.lines[-30:])
    counts = machine.card.counts
    assert counts.refused_reads == counts.dropped_writes == 0
    assert machine.bridge.counts.strange_interrupts == 0
    assert [server.counts["refused"] for server in machine.servers] == [0] * len(machine.servers)


@pytest.mark.parametrize(("arch", "iommu"), MACHINES)
def test_tour(machine, arch, iommu, capsys):
    """LINUX-QEMU-1: Debian boots with two disks of the card behind no IOMMU or QEMU's own, a file system on one; data is read back; R24."""
    run = machine.run("tour", arch=arch, iommu=iommu)
    check(run, machine)
    assert run.fact("disks") == "2"
    assert int(run.fact("verified")) == 200
    assert all("msix=2" in line for line in run.facts["disk"])
    maps = sum(server.counts[2] for server in machine.servers)  # DMA_MAP
    assert (maps > 200) == (iommu != "none")  # with an IOMMU the kernel maps each buffer
    assert all(server.counts["interrupts"] for server in machine.servers)
    with capsys.disabled():
        print(f"\n  {arch}, IOMMU {iommu}: mounted after {run.moments['mounted'][0]:.1f} s, {run.seconds:.1f} s in all, {maps} maps, "
              f"{run.cycles} cycles")  # fmt: skip


def test_own_iommu(tmp_path, capsys):
    """LINUX-QEMU-8: Linux's virtio_iommu binds to function 0; disks in groups of their own, their DMA mapped by it; R24, R46."""
    machine = Machine(tmp_path, WITH_IOMMU, functions=(0, 1, 2), judged=False)
    try:
        run = machine.run("tour", iommu="card", words=["ignore_loglevel"])
        assert run.is_good, f"{run.problem or run.status}\n" + "\n".join(run.lines[-30:])
        text, counts = "\n".join(run.lines), machine.card.counts
        assert run.fact("verified") == "200"
        assert [re.search(rf"pci 0000:00:{slot}\.0: Adding to iommu group (\d+)", text)[1] for slot in ("11", "12")] == ["0", "1"]
        assert "virtio_iommu virtio0: input address: 48 bits" in text
        assert counts.refused_reads == counts.dropped_writes == 0
        assert machine.session.doorbells[0] > 2000  # each map and each unmap of a buffer
        with capsys.disabled():
            print(f"\n  amd64, the card's own virtio-iommu: its doorbell rang {machine.session.doorbells[0]} times, {run.seconds:.1f} s, "
                  f"{run.cycles} cycles")  # fmt: skip
    finally:
        machine.close()


if kernel.cached("riscv64"):

    def test_riscv(tmp_path, capsys):
        """LINUX-QEMU-11: Linux's riscv_iommu_pci binds to function 0; its directory has three levels, disks in groups of their own."""
        machine, walked = Machine(tmp_path, RISCV, functions=(0, 1, 2), judged=False), Counter()

        def observe(event, tlp):
            if isinstance(event, TlpReceived) and tlp.type is TlpType.MRD and not tlp.requester_id & 7:
                walked[4 * tlp.length_dw] += 1

        machine.card.observe = observe
        try:
            run = machine.run("tour", arch="riscv64", iommu="card", words=["ignore_loglevel"])
            assert run.is_good, f"{run.problem or run.status}\n" + "\n".join(run.lines[-30:])
            text, counts = "\n".join(run.lines), machine.card.counts
            assert run.fact("verified") == "200" and "Kernel driver in use: iommu_pci" in text
            assert [re.search(rf"pci 0000:00:{slot}\.0: Adding to iommu group (\d+)", text)[1] for slot in ("11", "12")] == ["0", "1"]
            assert counts.refused_reads == counts.dropped_writes == 0
            assert walked[8] >= 2 * len(DISKS) and walked[32] >= len(DISKS)  # entries of two levels, then a device context, for each disk
            assert walked[16]  # commands
            with capsys.disabled():
                print(f"\n  riscv64, the card's own RISC-V IOMMU: reads by bytes {dict(walked)}, {run.seconds:.1f} s, {run.cycles} cycles")
        finally:
            machine.close()


if IS_NIGHTLY:

    @pytest.mark.timeout(1800)
    def test_maps(tmp_path, capsys):
        """LINUX-QEMU-9: 20,000 MAPs and as many UNMAPs by Linux's virtio_iommu: no access by what is not mapped any more."""
        machine = Machine(tmp_path, WITH_IOMMU, functions=(0, 1, 2), judged=False)
        try:
            watch = WallWatch(machine.card)
            run = machine.run("maps", iommu="card", words=["job_count=1280"], timeout_s=1500)
            assert run.is_good, f"{run.problem or run.status}\n" + "\n".join(run.lines[-30:])
            counts = machine.card.counts
            assert counts.refused_reads == counts.dropped_writes == 0
            assert watch.attached == {1: 1, 2: 2} and min(watch.counts["Map"], watch.counts["Unmap"]) >= 20_000
            assert watch.counts["accesses"] > 80_000
            with capsys.disabled():
                print(f"\n  {dict(watch.counts)}, {run.seconds:.1f} s")
        finally:
            machine.close()

    def test_first_stage(tmp_path, capsys):
        """LINUX-QEMU-12: a module of the guest drives a disk through first-stage tables of Linux's own; no stale translation; R24."""
        machine = Machine(tmp_path, RISCV, functions=(0, 1, 2), judged=False)
        try:
            watch = TableWatch(machine.card)
            run = machine.run("first_stage", arch="riscv64", iommu="card", words=["ignore_loglevel"], more=[module.build("first_stage")])
            text, counts = "\n".join(run.lines), machine.card.counts
            assert run.is_good, f"{run.problem or run.status}\n" + "\n".join(run.lines[-30:])
            said = re.findall(r"first_stage 0000:00:12\.0: (\w+)(?: (\w+))?$", text, re.MULTILINE)
            assert said == [("named", "ringwall"), ("readonly", ""), ("moved", "40"), ("large", "32768"), ("interrupts", "0x28000000"),
                            ("ended", "0")]  # fmt: skip
            assert run.fact("given_back") == "0000:00:12.0"
            assert "iommu_pci 0000:00:10.0: Fault 15 devid: 0x2 iotval: 1234567000 iotval2: 0" in text
            assert counts.refused_reads == counts.dropped_writes == 0
            data, large, interrupt = ((2, Cause.WRITE_PAGE_FAULT, page) for page in (0x12_3456_7000, 0x20_0020_0000, 0x2800_0000))
            assert watch.faults.keys() - {(2, Cause.WRITE_PAGE_FAULT, large[2] + n * 4096) for n in range(8)} == {data, interrupt}
            assert watch.faults[data] == 41 and watch.faults[large] >= 1 and watch.faults[interrupt] == 1
            # Of rounds, name, what can be read alone and what interrupts need; an UNMAP each; the ring's page and the interrupts'.
            assert watch.counts["leaves"] >= 46 and watch.counts["large"] >= 1 and watch.counts["IotinvalVma"] >= 45
            with capsys.disabled():
                print(f"\n  {dict(watch.counts)}, {watch.faults.total()} faults, {run.seconds:.1f} s, {run.cycles} cycles")
        finally:
            machine.close()

    def test_astray(tmp_path):
        """LINUX-QEMU-10: some bursts of a disk have a wrong IOVA: refused, told to Linux, their requests fail, no data is wrong."""
        machine = Machine(tmp_path, WITH_IOMMU, functions=(0, 1, 2), judged=False, card=misaimed.Astray)
        try:
            watch = WallWatch(machine.card)
            run = machine.run("strays", iommu="card", expect=(misaimed.EXPECTED, misaimed.EXPECTED_READ))
            assert run.is_good, f"{run.problem or run.status}\n" + "\n".join(run.lines[-30:])
            found = dict(re.findall(r"(\w+)=(\d+)", run.fact("strays")))
            told = Counter(re.findall(r"virtio_iommu virtio0: page fault from EP 1 at 0x[0-9a-f]+ \[([RW])\]", "\n".join(run.lines)))
            assert found["wrong"] == "0" and {"R": int(found["writes"]), "W": int(found["reads"])} == told
            assert min(told.values()) >= 2 and len(told) == 2
            counts = machine.card.counts
            assert counts.refused_reads == counts.dropped_writes == 0 and watch.counts["accesses"] > 400
        finally:
            machine.close()


def test_killed(machine):
    """LINUX-QEMU-2: QEMU is killed under load; the card is as after reset, nothing is mapped; the next guest finds a good one; R72."""
    with_load = machine.run("sizes", iommu="intel", until=lambda run: "init" in run.facts and machine.card.counts.writes > 300)
    assert with_load.status is None
    machine.settle()
    assert [machine.bridge.config_read(n, 4, 2) & 7 for n in DISKS] == [0] * len(DISKS)
    assert [machine.card.unmap(0, 1 << 64, function=n) for n in DISKS] == [0] * len(DISKS)
    check(machine.run("tour"), machine)
    assert [server.connections for server in machine.servers] == [2] * len(DISKS)


if IS_NIGHTLY:

    @pytest.mark.parametrize("iommu", ["none", "intel"])
    @pytest.mark.parametrize(("job", "fact", "count"), [("rebind", "rebound", 10), ("rescan", "rescanned", 3), ("reboot", "rebooted", 2),
                                                        ("reset", "resets", 3)])  # fmt: skip
    def test_jobs(machine, job, fact, count, iommu):
        """LINUX-QEMU-3: unbind and rebind, remove and rescan, warm reboot with rings live, function level reset under load; R61, R72."""
        run = machine.run(job, iommu=iommu, words=[f"job_count={count}"])
        check(run, machine)
        assert int(run.fact(fact).split()[0]) == count

    def test_stopped(machine):
        """LINUX-QEMU-4: the server stands still for a while in the middle of requests; the guest goes on where it was; R72."""
        stops = []

        def stop(run):
            if "mounted" in run.facts and not stops:
                stops.append(machine.card.cycle)
                time.sleep(3)
            return False

        check(machine.run("tour", until=stop), machine)
        assert stops

    @pytest.mark.parametrize("iommu", ["none", "intel"])
    def test_misaimed(tmp_path, iommu):
        """LINUX-QEMU-7: every 80th data request of the RTL goes beside what is mapped, or was: as in LINUX-UML-8. [PCIe5 2.3.1]"""
        machine, count = Machine(tmp_path, misaimed.CONFIG, card=misaimed.Misaimed, judged=False), 8
        try:
            requests = misaimed.DataRequests(machine.card)
            run = machine.run("wrongdma", iommu=iommu, words=[f"job_count={count}"], expect=(misaimed.EXPECTED,))
            assert run.is_good, f"{run.problem or run.status}\n" + "\n".join(run.lines[-30:])
            misaimed.check(run, requests, machine.card.counts, count)
        finally:
            machine.close()
