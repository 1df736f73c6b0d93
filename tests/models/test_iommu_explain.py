"""The command that explains a translation, and the bulk form against the step-by-step walk. [RVIOMMU1.0 3.3]"""

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from ringwall.models.iommu.__main__ import main
from ringwall.models.iommu.bulk import translate_many
from ringwall.models.iommu.entries import SIZE_2M, SV32, SV32X4, SV39, SV39X4, SV48, SV48X4, SV57, SV57X4, DeviceContext, ProcessContext
from ringwall.models.iommu.faults import AccessType, TranslationFault
from ringwall.models.iommu.registers import Capabilities
from ringwall.models.iommu.tables import Allocator, DeviceDirectory, GuestView, MsiPte, MsiTable, PageTable, ProcessDirectory
from ringwall.models.iommu.walk import Implementation, Iommu, PlainRegisters, Request, RequestKind
from ringwall.models.memory import GuestMemory

POOL, GUEST = 0x8000_0000, 0x1000_0000
FULL = Capabilities(Sv48=True, Sv57=True, Svpbmt=True, Sv39x4=True, Sv48x4=True, Sv57x4=True, AMO_HWAD=True, ATS=True, T2GPA=True,
                    PD8=True, Sv32=True, Sv32x4=True, END=True, MSI_FLAT=True, PAS=50)
SECOND = {SV39: SV39X4, SV48: SV48X4, SV57: SV57X4, SV32: SV32X4}


def build(rng, scheme, kind, *, updates=False, msi=False, order="little"):
    """A random IOMMU with one device (2) of one stage or both, one process with SUM; some entries are wrong, some pages cannot be read."""
    rv32, features = scheme is SV32, FULL.switched_on()
    memory = GuestMemory(all_ram=False)
    memory.add_range(POOL, 0x80_0000)
    allocator = Allocator(memory, POOL, 0x80_0000)
    directory = DeviceDirectory(memory, allocator, levels=1, extended=True, order=order, gxl_writable=True)
    view, tables, second = memory, allocator, None
    options = {"order": order, "features": features}
    if kind != "first":
        second = PageTable(memory, allocator, scheme=SECOND[scheme], **options)
        for n in range(160):
            second.map_page(GUEST + n * 0x1000, allocator.page(), a=not updates or rng.random() < 0.8)
        view = GuestView(memory, second)
        tables = Allocator(view, GUEST, 160 * 0x1000)
    top = 1 << min(SECOND[scheme].address_bits, 34 if rv32 else 56)
    sizes = [size for size in scheme.sizes if size < 1 << 40]
    gpas = [rng.randrange(top) // size * size for size in sizes for _ in range(5)]

    def fill(table, places):
        for at in places:
            size = rng.choice([size for size in sizes if at % size == 0])
            try:
                table.map_page(at, rng.choice(gpas) // size * size, size=size, perms=rng.choice(["ru", "rwu", "rxu", "rwxu", "rw"]),
                               a=rng.random() < 0.9, d=rng.random() < 0.8, pbmt=0 if rv32 else rng.randrange(3))
            except ValueError:
                continue  # overlaps another
            name = rng.choice(sorted(table.defects))
            if rng.random() < 0.3 and ("LEAF" in name) == (scheme.level_of_size(size) == 0) and "POINTER" not in name:
                table.corrupt(at, name)

    half = 1 << scheme.address_bits - 1
    iovas = [rng.randrange(half) // size * size for size in sizes for _ in range(5)]
    iovas += [at | (1 << 64) - half for at in iovas[::2] if not rv32]
    context = DeviceContext(SXL=rv32, SADE=updates, GADE=updates, SBE=order == "big")
    if kind != "second":
        table = PageTable(view, tables, scheme=scheme, **options)
        fill(table, iovas)
        processes = ProcessDirectory(view, tables, levels=1, order=order)
        processes.set(1, ProcessContext.first_stage(scheme, table.root, PSCID=3, ENS=True, SUM=True))
        context = replace(context, PDTV=True, DPE=True, fsc_mode=1, fsc_ppn=processes.root >> 12)
        processes.set(0, ProcessContext.first_stage(scheme, table.root, PSCID=3))
    if second:
        fill(second, gpas)
        context = context.with_second_stage(second.scheme, second.root, GSCID=1)
        if msi:
            pages = MsiTable(memory, allocator, mask=0x41, pattern=gpas[0] >> 12, order=order)
            pages.set(gpas[0], MsiPte(spa=0x7000))
            context = context.with_msi_table(pages.root, mask=0x41, pattern=gpas[0] >> 12)
    directory.set(2, context)
    if rng.random() < 0.5:
        memory.poison(POOL + rng.randrange(0x40) * 0x1000, 8)
    fctl = (order == "big") | (rv32 and kind != "first") << 2
    iommu = Iommu(memory, FULL, registers=PlainRegisters(directory.ddtp, fctl), implementation=Implementation(gxl_writable=True))
    probes = (gpas if kind == "second" else iovas) * 2
    probes = [at + rng.choice([0, 5, 0x1000, rng.randrange(SIZE_2M)]) for at in probes] + [rng.getrandbits(64) for _ in range(5)]
    return iommu, np.array([at & (1 << 64) - 1 for at in probes], np.uint64)


def stepwise(iommu, request):
    """The translation, or the fault."""
    try:
        return iommu.translate(request)
    except TranslationFault as fault:
        return fault


@pytest.mark.parametrize("scheme", [SV39, SV48, SV57, SV32], ids=lambda scheme: scheme.name)
def test_iommu_explain_bulk(scheme):
    """MODEL-IOMMU-BULK-1: the bulk form agrees with the walk in every field: both stages, updates, MSI pages, orders, bad memory."""
    rng, seen, slow = random.Random(scheme.name), set(), 0
    for trial in range(12):
        iommu, iovas = build(rng, scheme, ("first", "second", "both")[trial % 3], updates=trial % 4 == 3, msi=trial % 5 == 4,
                             order="big" if trial % 6 == 5 else "little")
        single = Iommu(iommu.memory.snapshot(), FULL, registers=iommu.registers, implementation=iommu.implementation)
        access, pid = list(AccessType)[trial // 3 % 3], rng.choice([None, 1]) if trial % 3 != 1 else None
        request = Request(2, 0, access, pid, priv=pid == 1 and rng.random() < 0.4)
        found = translate_many(iommu, request, iovas)
        slow += found.slow_count
        for n, iova in enumerate(iovas.tolist()):
            one = stepwise(single, replace(request, iova=iova))
            seen.add(found.cause[n])
            if isinstance(one, TranslationFault):
                assert (found.cause[n], found.iotval2[n]) == (one.cause, one.iotval2), hex(iova)
                continue
            rights = found.readable[n], found.writable[n], found.executable[n]
            fields = found.cause[n], found.spa[n], found.size_log2[n], *rights, found.pbmt[n]
            assert fields == (0, one.spa, one.size.bit_length() - 1, one.readable, one.writable, one.executable, one.pbmt), hex(iova)
    assert {0, 12, 13, 15, 20, 21, 23} <= seen
    assert slow


def test_iommu_explain_bulk_without_tables():
    """MODEL-IOMMU-BULK-2: Off, Bare, a bad directory, translated requests are answered for all at once; translation requests refused."""
    memory = GuestMemory()
    iovas = np.array([0, 0x1234, (1 << 64) - 1], np.uint64)
    for ddtp, kind, cause in ((0, RequestKind.UNTRANSLATED, 256), (1, RequestKind.UNTRANSLATED, 0), (2, RequestKind.UNTRANSLATED, 258),
                              (1, RequestKind.TRANSLATED, 260)):
        iommu = Iommu(memory, registers=PlainRegisters(ddtp))
        found = translate_many(iommu, Request(0, 0, AccessType.READ, kind=kind), iovas)
        assert found.cause.tolist() == [cause] * len(found)
        if not cause:
            assert (found.spa == iovas).all()
            assert set(found.size_log2.tolist()) == {64}
    with pytest.raises(ValueError, match="must be an access"):
        translate_many(iommu, Request(0, 0, AccessType.READ, kind=RequestKind.ATS), iovas)
    assert len(translate_many(iommu, Request(0, 0, AccessType.READ), iovas[:0])) == 0


def test_iommu_explain_bulk_corners():
    """MODEL-IOMMU-BULK-3: regions without interrupt files, and SXL = 1 in front of a wider second stage, as the walk has them."""
    memory = GuestMemory()
    allocator = Allocator(memory, POOL, 0x80_0000)
    directory = DeviceDirectory(memory, allocator, levels=1, extended=True)
    second = PageTable(memory, allocator, scheme=SV48X4)
    for n in range(32):
        second.map_page(n << 30, n << 30, size=1 << 30)
    files = MsiTable(memory, allocator, mask=3, pattern=0x2_8000)
    context = DeviceContext().with_second_stage(SV48X4, second.root, GSCID=1).with_msi_table(files.root, mask=3, pattern=0x2_8000)
    iommu = Iommu(memory, FULL, registers=PlainRegisters(directory.ddtp), implementation=Implementation(gxl_writable=True))
    request = Request(2, 0, AccessType.READ)
    iovas = np.array([0x2800_4000, 0x2810_0000, 0x1000, 0x4000_0000, 0x2800_0000, 0x3_FFFF_FFFF, 0x4_0000_0000, 0x7_0000_1234], np.uint64)
    for sxl, sizes, causes in ((False, [14, 20, 29, 30, None, 30, 30, 30], {262}),
                               (True, [14, 20, 29, 30, None, 30, None, None], {262, 21})):
        directory.set(2, replace(context, SXL=sxl))
        found = translate_many(iommu, request, iovas)
        assert [None if cause else size for cause, size in zip(found.cause.tolist(), found.size_log2.tolist())] == sizes
        assert set(found.cause.tolist()) == causes | {0}
        for n, iova in enumerate(iovas.tolist()):
            one = stepwise(iommu, replace(request, iova=iova))
            assert found.cause[n] == (one.cause if isinstance(one, TranslationFault) else 0)
            assert found.cause[n] or (one.spa, one.size) == (found.spa[n], 1 << int(found.size_log2[n]))


@pytest.fixture
def dump(tmp_path):
    """An image of memory from 0x1000 on: device 8 with a table that maps 0x12_3456_7000 to 0xABC_D000 and 2 MiB at 0x40_0000."""
    memory = GuestMemory()
    allocator = Allocator(memory, 0x1000, 0x1_0000)
    directory = DeviceDirectory(memory, allocator, levels=1)
    table = PageTable(memory, allocator)
    table.map_page(0x12_3456_7000, 0xABC_D000, g=True)
    table.map_page(0x40_0000, 0x20_0000, size=SIZE_2M, perms="rxu", a=False)
    directory.set(8, DeviceContext.sv39(table.root, PSCID=5, SADE=True))
    path = tmp_path / "dump.bin"
    path.write_bytes(memory.read(0x1000, 0x1_0000))
    return ["explain", "--memory", f"{path}@0x1000", "--ddtp", hex(directory.ddtp), "--device", "0x8"], tmp_path


def test_iommu_explain_command(dump, capsys):
    """MODEL-IOMMU-EXPLAIN-1: a translation is printed step by step, with sections and entries, and its end; 0 or 1 is the exit code."""
    command, path = dump
    assert main([*command, "--iova", "0x1234567abc", "--write"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["3.3.1", *["RVPRIV Sv39 step 2"] * 3, "RVPRIV Sv39 step 10", "3.3 step 20", "verdict"]
    assert f"{0xABCD << 10 | 0xF7:#018x}" in lines[3]
    assert lines[-1] == "verdict: SPA 0xabcdabc, 4 KiB, rw-, PMA, global; 4 table reads, 0 updates of A and D"
    before = (path / "dump.bin").read_bytes()
    assert main([*command, "--iova", "0x400123", "--exec"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "verdict: SPA 0x200123, 2 MiB, r-x, PMA; 3 table reads, 1 updates of A and D"
    assert (path / "dump.bin").read_bytes() == before
    assert main([*command, "--iova", "0x400123", "--no-atomics"]) == 1
    assert "verdict: READ_PAGE_FAULT (13), iotval 0x400123, iotval2 0x0, recorded; 3 table" in capsys.readouterr().out
    assert main([*command, "--iova", "0x400123", "--ats"]) == 1
    assert "verdict: completion UR; TRANSACTION_TYPE_DISALLOWED (260)" in capsys.readouterr().out
    assert main([*command, "--iova", "0x1000", "--process", "3", "--priv", "--capabilities", "0x3800000210"]) == 1
    assert "DDT_ENTRY_MISCONFIGURED (259)" in capsys.readouterr().out  # SADE without AMO_HWAD
    assert main([*command, "--iova", "0x1234567abc", "--capabilities", "Sv39,AMO_HWAD", "--translated"]) == 1
    assert "translated request without EN_ATS" in capsys.readouterr().out
    assert main([*command[:3], "--ddtp", "1", "--device", "1", "--iova", "0x5"]) == 0
    assert "SPA 0x5, all addresses, rwx" in capsys.readouterr().out
    assert main([*command[:3], "--ddtp", "0x40000002", "--device", "1", "--iova", "0x5"]) == 1
    assert "is not in the image: DDT_ENTRY_LOAD_ACCESS_FAULT (257)" in capsys.readouterr().out


def test_iommu_explain_many(dump, capsys):
    """MODEL-IOMMU-EXPLAIN-2: --bulk and --random print what became of the addresses and their rate; the process ends by itself."""
    command, path = dump
    iovas = np.array([0x12_3456_7ABC, 0x40_0000, 0x40_0001, 0x9000], "<u8")
    (path / "iovas.bin").write_bytes(iovas.tobytes())
    assert main([*command, "--bulk", str(path / "iovas.bin")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines[:4]] == [
        "3 translated", "1 READ_PAGE_FAULT (13)", "1 of them in 4 KiB", "2 of them in 2 MiB"]
    assert lines[4].startswith("4 addresses in ")
    assert lines[4].endswith("per second; 2 step by step")
    assert main([*command, "--random", "50", "--iova", "0x400000", "--span", "0x200000", "--exec"]) == 0
    assert "50 translated" in capsys.readouterr().out
    assert main([*command, "--random", "20"]) == 1
    assert "20 READ_PAGE_FAULT (13)" in capsys.readouterr().out
    line = [sys.executable, "-m", "ringwall.models.iommu", *command, "--iova", "0x1234567abc"]
    done = subprocess.run(line, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("verdict: SPA 0xabcdabc")


def test_iommu_explain_bad_input(dump, capsys):
    """MODEL-IOMMU-EXPLAIN-3: what the command line must not say ends with 2 and one sentence that names it; --help tells all options."""
    command, path = dump
    (path / "odd.bin").write_bytes(bytes(9))
    (path / "empty.bin").write_bytes(b"")
    one = [*command, "--iova", "0"]
    for arguments, message in (
        (command, "one of --iova, --bulk and --random is needed"), (["explain"], "required"), ([], "required"),
        ([*command, "--iova", "1x"], "must be a number of at most 64 bits"), ([*command, "--iova", "-1"], "at most 64 bits"),
        ([*command, "--iova", "0x10000000000000000"], "must be a number of at most 64 bits"), ([*one, "--priv"], "--priv needs --process"),
        ([*one, "--device", "0x1000000"], "Device id must be"), ([*one, "--process", "0x100000"], "Process id must be"),
        ([*one, "--ddtp", "5"], "0 to 4, not 5"), ([*one, "--write", "--exec"], "not allowed with"),
        ([*one, "--memory", str(path / "none.bin")], "must be a file with something in it"),
        ([*one, "--memory", str(path / "empty.bin")], "must be a file with something in it"),
        ([*one, "--capabilities", "Sv40"], "names of its fields, not 'Sv40'"), ([*one, "--capabilities", "0x10"], "PAS must be"),
        ([*one, "--capabilities", "Sv57"], "Sv48"), ([*command, "--random", "0"], "must be at least 1"),
        ([*command, "--random", "0x4000001"], "must be at most 67108864, not '0x4000001'"),
        ([*command, "--bulk", str(path / "odd.bin")], "must hold one or more addresses of 8 bytes, not 9 bytes"),
        ([*command, "--bulk", str(path / "none.bin")], "No such file"), ([*command, "--bulk", str(path / "empty.bin")], "not 0 bytes"),
        ([*command, "--random", "5", "--ats"], "must be an access"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2, arguments
        assert message in capsys.readouterr().err, arguments
    with pytest.raises(SystemExit) as ended:
        main(["explain", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--memory", "--ddtp", "--process", "--bulk", "--random", "--capabilities", "Ends with 0"))
