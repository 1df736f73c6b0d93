"""`make sim`: its run at every width, its settings, and that it sees what is wrong."""

import re
import shutil
from dataclasses import asdict
from functools import partial

import cocotb
import pytest

from ringwall.sim.card import bench_card
from ringwall.sim.first_light import SECTOR, Run, Settings
from ringwall.sim.main import STORE_BYTES, light, main, make_image
from ringwall.sim.run import params, run

KIB = 512


def settings_of(folder, width, **changes):
    """Return settings with a small image of their own."""
    image = make_image(folder / "ext4.img", seed=width, kib=KIB)
    return Settings(image=str(image), report=str(folder / "index.html"), progress=str(folder / "progress"), width=width, bench=True,
                    **changes)  # fmt: skip


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_image(request, tmp_path, width):
    """SYS-RUN-1: an ext4 image passes the rings both ways at each width; figures are there and below the limit (R22, R24)."""
    settings = settings_of(tmp_path, width, verify=True)
    _, result = light(settings, node=request.node.nodeid, seed=width, timeout_s=400)
    assert result["good"]
    assert result["differences"] == 0
    assert result["comparisons"] > 1000
    for way in ("read", "write"):
        assert 0 < result["rates"][way] <= result["limits"][way] <= width // 8
    counts, lanes = result["counts"], result["lanes"]
    assert counts["iotlb_hit"] > counts["walk"] > 0
    assert 1 <= counts["walk_read"] / counts["walk"] <= 3, "Sv39: up to 3 reads, 1 with the upper levels cached"
    assert 1 < counts["tags_in_flight"] <= 256
    assert all(lanes[lane] > 0 for lane in ("doorbell", "ring read", "walk", "data read", "data write", "used ring", "MSI-X"))
    values = {figure["name"]: figure["value"] for section in result["sections"] for figure in section["figures"]}
    for name in ("guest memory", "golden model", "store of the card", "e2fsck"):
        assert values[f"{name} against the image"] == f"{KIB * 1024:,} bytes equal"
    assert values["differences"] == "0"
    page = (tmp_path / "index.html").read_text()
    assert "Every byte and every TLP" in page
    assert all(f">{lane}<" in page for lane in ("doorbell", "ring read", "walk", "used ring", "MSI-X"))
    assert not re.search(r'(src|href)="|url\(|@import', page), "the page needs nothing from outside"
    assert len(page) < 400_000
    assert (tmp_path / "progress").read_text().split("\t")[:3] == ["read", str(KIB * 1024), str(KIB * 1024)]


def test_image_is_the_same(tmp_path):
    """SYS-RUN-2: one seed gives one image; another seed another."""
    images = [make_image(tmp_path / f"{n}.img", seed, kib=256).read_bytes() for n, seed in enumerate((5, 5, 6))]
    assert images[0] == images[1] != images[2]
    assert images[0][1080:1082] == b"\x53\xef", "the magic number of ext2 and its heirs"


@pytest.mark.parametrize("planted", ["store", "golden", "memory"])
def test_faults_are_seen(request, tmp_path, planted):
    """SYS-RUN-3: one bit flipped in the card's store, in the golden model or in guest memory fails the run and its report says where."""
    settings = settings_of(tmp_path, 256)
    with pytest.raises(AssertionError, match=r"golden model differs|guest memory differs|store of the card differs|model:"):
        run(bench_card(), module=__name__, node=request.node.nodeid, params=asdict(settings) | {"planted": planted}, sim="verilator")
    page = (tmp_path / "index.html").read_text()
    assert {"store": "store of the card differs", "golden": "model:", "memory": "guest memory differs"}[planted] in page
    assert "Every byte and every TLP" not in page


class Spoiled(Run):
    """A run with one bit flipped between writing and reading."""

    async def _flow(self, phase, passage, make):
        back = await super()._flow(phase, passage, make)
        match self.planted, phase:
            case "golden", "write":
                self.disk.golden.store[5000] ^= 4
            case "memory", "read":
                place = max(back)
                back[place] = bytes([back[place][0] ^ 1]) + back[place][1:]
        return back

    def _stored(self):
        found = super()._stored()
        return found[:777] + bytes([found[777] ^ 128]) + found[778:] if self.planted == "store" else found


@cocotb.test()
async def one_bit_is_flipped(dut):
    """As :func:`ringwall.sim.first_light.image_comes_back`, spoiled."""
    given = params()
    Spoiled.planted = given.pop("planted")
    await Spoiled(dut, Settings(**given), cocotb.RANDOM_SEED, None).judged(cocotb.SIM_NAME)


@pytest.mark.parametrize("name, value, sentence", [
    ("SIM", "modelsim", "SIM must be verilator or icarus, not 'modelsim'."),
    ("WIDTH", "100", "WIDTH must be 64, 128, 256 or 512, not '100'."),
    ("WIDTH", "many", "WIDTH must be 64, 128, 256 or 512, not 'many'."),
    ("LATENCY", "0", "LATENCY must be a whole number from 1 to 100,000, not '0'."),
    ("LATENCY", "2.5", "LATENCY must be a whole number from 1 to 100,000, not '2.5'."),
    ("SEED", "-1", "SEED must be a whole number from 0 to 4,294,967,295, not '-1'."),
    ("WAVES", "yes", "WAVES must be 0 or 1, not 'yes'."),
    ("IMAGE", "/nowhere/disk.img", "IMAGE must be a file that can be read: /nowhere/disk.img: No such file or directory."),
    ("IMAGE", "/", "IMAGE must be a file that can be read: /: Is a directory."),
])  # fmt: skip
def test_bad_settings(capfd, monkeypatch, name, value, sentence):
    """SYS-RUN-4: a wrong value, by variable or option, gets one sentence on standard error and exit status 2, before anything is built."""
    for other in ("SIM", "WIDTH", "LATENCY", "SEED", "WAVES", "IMAGE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr("ringwall.sim.main.light", None)
    monkeypatch.setenv(name, value)
    assert main([]) == 2
    assert capfd.readouterr() == ("", sentence + "\n")
    monkeypatch.delenv(name)
    if name != "WAVES":
        assert main([f"--{name.lower()}={value}"]) == 2
        assert capfd.readouterr() == ("", sentence + "\n")


def test_bad_images(capfd, monkeypatch, tmp_path):
    """SYS-RUN-5: an empty and an oversized image, and a host without mke2fs, get one sentence and exit status 2."""
    monkeypatch.setattr("ringwall.sim.main.light", None)
    empty, large = tmp_path / "empty", tmp_path / "large"
    empty.touch()
    with large.open("wb") as file:
        file.truncate(STORE_BYTES + 1)
    for path, sentence in (
        (empty, f"IMAGE must not be empty: {empty}."),
        (large, f"IMAGE must fit into the {STORE_BYTES:,} bytes of the card's store: {large} has {STORE_BYTES + 1:,}."),
    ):
        assert main(["--image", str(path)]) == 2
        assert capfd.readouterr() == ("", sentence + "\n")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.delenv("IMAGE", raising=False)
    assert main([]) == 2
    assert capfd.readouterr() == ("", "mke2fs is not installed: type 'apt-get install e2fsprogs', or give an image with IMAGE=path.\n")


def test_own_image(capfd, monkeypatch, tmp_path):
    """SYS-RUN-6: any file goes through the card, filled up to whole sectors, also one smaller than the first request; the command
    prints its table and where the report is, and ends with 0."""
    for other in ("SIM", "WIDTH", "LATENCY", "SEED", "WAVES", "IMAGE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr("ringwall.sim.main.NODE", "make-sim-of-a-test")
    monkeypatch.setattr("ringwall.sim.main.Settings", partial(Settings, bench=True))
    monkeypatch.setattr("ringwall.sim.main.build_root", lambda: tmp_path / "build")
    image = tmp_path / "note.txt"
    image.write_bytes(b"x" * (SECTOR + 1))
    assert main(["--image", str(image), "--latency", "40", "--seed", "9"]) == 0
    said, errors = capfd.readouterr()
    assert not errors
    assert "1,024 bytes equal" in said
    assert "differences" in said
    assert str(tmp_path / "build/report/index.html") in said
    assert "100 %" in said, "progress"
    assert (tmp_path / "build/report/index.html").is_file()
    assert image.read_bytes() == b"x" * (SECTOR + 1), "the user's file is as it was"
