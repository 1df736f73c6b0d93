"""Errors of a function: every cause with every setting, against a decision table written here once more."""

import itertools

import pytest

from ringwall.models.aer import report_to_all
from ringwall.models.config_space import (
    Cause,
    ConfigSpace,
    Correctable,
    FunctionDescription,
    Message,
    Uncorrectable,
    aer_capability,
    pcie_capability,
    sriov_capability,
    virtual_function,
)

HEADER = [0x4000_0001, 0x0100_030F, 0x1234_5678]
AER = 0x100
DEVCTL, DEVSTA = 0x48, 0x4A

# cause: (bit of AER or None, bits of Status, more of them with Parity Error Response, advisory when not fatal) [PCIe5 6.2.7, 6.2.3.2.4]
ROWS = {
    Cause.UNSUPPORTED_NON_POSTED: (20, 0, 0, True),
    Cause.UNSUPPORTED_POSTED: (20, 0, 0, False),
    Cause.ABORTED_NON_POSTED: (15, 0x0800, 0, True),
    Cause.ABORTED_POSTED: (15, 0x0800, 0, False),
    Cause.UNEXPECTED_COMPLETION: (16, 0, 0, True),
    Cause.COMPLETION_TIMEOUT: (14, 0, 0, False),
    Cause.RECEIVED_UR: (None, 0x2000, 0, False),
    Cause.RECEIVED_CA: (None, 0x1000, 0, False),
    Cause.POISONED_COMPLETION: (12, 0x8000, 0x0100, True),
    Cause.POISONED_REQUEST: (12, 0x8000, 0, True),
    Cause.SENT_POISONED: (None, 0, 0x0100, False),
    Cause.MALFORMED: (18, 0, 0, False),
    Cause.ECRC: (19, 0, 0, False),
    Cause.RECEIVER_OVERFLOW: (17, 0, 0, False),
    Cause.FLOW_CONTROL: (13, 0, 0, False),
    Cause.DATA_LINK_PROTOCOL: (4, 0, 0, False),
    Cause.INTERNAL: (22, 0, 0, False),
}
FATAL = {4, 13, 17, 18, 22}  # at reset


def function(*, has_aer=True):
    ext = (aer_capability(uncorrectable=0x07FF_F010, correctable=0xF1C1),) if has_aer else ()
    return ConfigSpace(FunctionDescription(1, 2, 3, capabilities=(pcie_capability(flr=True),), ext_capabilities=ext))


def log_of(space):
    return [space.read(AER + 0x1C + 4 * n, 4) for n in range(4)]


@pytest.mark.parametrize("cause", ROWS)
def test_aer(cause):
    """ERR-MODEL-1: each cause with each severity, mask, reporting enable and SERR#: status, pointer, log, message (R40)."""
    bit, status, parity_status, may_advise = ROWS[cause]
    for has_parity, serr, control, fatal, masked, advisory_masked in itertools.product(
            (0, 1), (0, 1), range(16), (False, True), (False, True), (False, True)):  # fmt: skip
        space = function()
        space.write(0x04, 2, has_parity << 6 | serr << 8)
        space.write(DEVCTL, 2, control)
        mark = 1 << (bit or 0)
        space.write(AER + 8, 4, mark if masked else 0)
        space.write(AER + 12, 4, mark if fatal else 0)
        space.write(AER + 0x14, 4, 0x2000 if advisory_masked else 0)
        message = space.report_error(cause, HEADER)
        wanted_status = status | (parity_status if has_parity else 0)
        if bit is None:
            assert (message, space.read(0x06, 2) & 0xFF00, space.read(DEVSTA, 2), space.read(AER + 4, 4)) == (None, wanted_status, 0, 0)
            continue
        unsupported = bit == 20
        reports_unsupported = bool(control & 8)
        if may_advise and not fatal:
            device, correctable = 1, 0x2000
            logs = not advisory_masked
            wanted = Message.ERR_COR if logs and control & 1 and (reports_unsupported or not unsupported) else None
        else:
            device, correctable, logs = 4 if fatal else 2, 0, True
            enabled = serr or (control & (4 if fatal else 2) and (reports_unsupported or not unsupported))
            wanted = (Message.ERR_FATAL if fatal else Message.ERR_NONFATAL) if enabled and not masked else None
            wanted_status |= 0x4000 if wanted is not None and serr else 0
        latched = logs and not masked
        assert message is wanted
        assert space.read(0x06, 2) & 0xFF00 == wanted_status
        assert space.read(DEVSTA, 2) == device | (8 if unsupported else 0)
        assert (space.read(AER + 4, 4), space.read(AER + 0x10, 4)) == (mark if logs else 0, correctable)
        assert space.read(AER + 0x18, 4) & 0x1F == (bit if latched else 0)
        assert log_of(space) == ([*HEADER, 0] if latched else [0] * 4)


def test_aer_severities():
    """ERR-MODEL-2: severities and masks as at reset, and without the capability: fatal or not; nothing at all until it is enabled."""
    for has_aer in (True, False):
        for cause, (bit, _, _, may_advise) in ROWS.items():
            if bit is None:
                continue
            space = function(has_aer=has_aer)
            if has_aer:
                space.write(AER + 0x14, 4, 0)
                space.write(AER + 8, 4, 0)
            assert space.report_error(cause) is None
            space.write(DEVCTL, 2, 0xF)
            wanted = Message.ERR_FATAL if bit in FATAL else Message.ERR_COR if may_advise else Message.ERR_NONFATAL
            assert space.report_error(cause) is wanted
        space = function(has_aer=has_aer)
        space.write(DEVCTL, 2, 0xF)
        assert (space.report_error(Cause.INTERNAL) is None) is has_aer, "masked at reset"
        assert (space.report_error(Cause.UNEXPECTED_COMPLETION) is None) is has_aer, "advisory errors are masked at reset"
        assert space.report_error(Correctable.BAD_TLP) is Message.ERR_COR


def test_aer_advisory():
    """ERR-MODEL-3: the caller may say whether it goes on; without role-based reporting nothing is advisory."""
    space = function()
    space.write(DEVCTL, 2, 0xF)
    space.write(AER + 0x14, 4, 0)
    assert space.report_error(Cause.COMPLETION_TIMEOUT, is_advisory=True) is Message.ERR_COR
    assert space.report_error(Cause.POISONED_REQUEST, is_advisory=False) is Message.ERR_NONFATAL
    assert space.report_error(Cause.MALFORMED, is_advisory=True) is Message.ERR_FATAL
    space.replace_bits(0x44, 1 << 15, 0)
    assert space.report_error(Cause.UNEXPECTED_COMPLETION) is Message.ERR_NONFATAL


@pytest.mark.parametrize("error", Correctable)
def test_aer_correctable(error):
    """ERR-MODEL-4: a correctable error: status and Device Status whatever the mask, a message only unmasked and enabled."""
    for masked, control in itertools.product((False, True), (0, 1, 0xE, 0xF)):
        space = function()
        space.write(0x04, 2, 0x100)
        space.write(DEVCTL, 2, control)
        space.write(AER + 0x14, 4, 1 << error if masked else 0)
        assert space.report_error(error, HEADER) is (Message.ERR_COR if control & 1 and not masked else None)
        assert (space.read(AER + 0x10, 4), space.read(AER + 4, 4), space.read(DEVSTA, 2)) == (1 << error, 0, 1)
        assert log_of(space) == [0] * 4
        assert not space.read(0x06, 2) & 0x4000


def test_aer_first_error():
    """ERR-MODEL-5: the first unmasked error holds pointer and log until its status bit is cleared, through resets too."""
    space = function()
    second, third = [0x6000_0001, 1, 2, 3], [0x0A00_0000, 4, 5]
    space.write(AER + 8, 4, 1 << 16)
    space.write(AER + 0x14, 4, 0)
    space.report_error(Cause.UNEXPECTED_COMPLETION, third)
    assert (space.read(AER + 0x18, 4), log_of(space)) == (0, [0] * 4), "masked"
    assert space.unspecified() == {AER + 0x18: 0x1F} | {AER + 0x1C + 4 * n: 0xFFFF_FFFF for n in range(4)}
    space.report_error(Cause.MALFORMED, HEADER)
    space.report_error(Cause.UNSUPPORTED_POSTED, second)
    space.report_error(Cause.MALFORMED, second)
    assert (space.read(AER + 0x18, 4), log_of(space), space.unspecified()) == (18, [*HEADER, 0], {})
    assert space.read(AER + 4, 4) == 1 << 16 | 1 << 18 | 1 << 20
    space.write(AER + 4, 4, 1 << 20)
    space.write(AER + 0x18, 4, 0)
    space.report_error(Cause.UNSUPPORTED_POSTED, second)
    space.write(0x48, 2, 0x8000)
    space.hot_reset()
    assert (space.read(AER + 0x18, 4), log_of(space), space.read(AER + 4, 4)) == (18, [*HEADER, 0], 1 << 16 | 1 << 18 | 1 << 20)
    assert space.read(DEVSTA, 2) == 0, "not sticky"
    space.write(AER + 6, 1, 1 << 2)
    space.report_error(Cause.COMPLETION_TIMEOUT)
    assert (space.read(AER + 0x18, 4), space.read(AER + 4, 4)) == (14, 1 << 14 | 1 << 16 | 1 << 20)
    assert space.unspecified() == {AER + 0x1C + 4 * n: 0xFFFF_FFFF for n in range(4)}, "it had no header"
    space.write(AER + 4, 4, 0xFFFF_FFFF)
    space.report_error(Cause.UNSUPPORTED_POSTED, second)
    assert (space.read(AER + 0x18, 4), log_of(space), space.unspecified()) == (20, second, {})
    space.power_on()
    assert (space.read(AER + 0x18, 4), log_of(space), space.read(AER + 4, 4)) == (0, [0] * 4, 0)


def test_aer_of_virtual_function():
    """ERR-MODEL-6: a virtual function logs in its own registers and obeys its physical function's enables, masks and severities (R54)."""
    base = FunctionDescription(1, 2, 3)
    virtual = virtual_function(base, capabilities=(pcie_capability(flr=True),), ext_capabilities=(aer_capability(),))
    sriov = sriov_capability(2, first_offset=1, stride=1, device=2)
    space = ConfigSpace(FunctionDescription(1, 2, 3, capabilities=(pcie_capability(),), ext_capabilities=(aer_capability(), sriov),
                                            virtual=virtual))  # fmt: skip
    space.write(space.ext_offsets[1] + 0x10, 2, 2)
    space.write(space.ext_offsets[1] + 8, 2, 1)
    one, other = space.virtual_functions
    assert one.report_error(Cause.UNSUPPORTED_POSTED, HEADER) is None
    one.write(DEVCTL, 2, 0xF)
    assert one.report_error(Cause.UNSUPPORTED_POSTED) is None
    space.write(DEVCTL, 2, 0xF)
    assert one.report_error(Cause.UNSUPPORTED_POSTED) is Message.ERR_NONFATAL
    space.write(AER + 12, 4, 1 << 20)
    assert one.report_error(Cause.UNSUPPORTED_POSTED) is Message.ERR_FATAL
    space.write(AER + 8, 4, 1 << 20)
    assert one.report_error(Cause.UNSUPPORTED_POSTED) is None
    assert (one.read(AER + 4, 4), one.read(AER + 0x18, 4), log_of(one), one.read(DEVSTA, 2)) == (1 << 20, 20, [*HEADER, 0], 0xE)
    assert [quiet.read(AER + 4, 4) | quiet.read(DEVSTA, 2) for quiet in (space, other)] == [0, 0]


def test_aer_of_every_function():
    """ERR-MODEL-7: an error of no one function is logged in all, one message of each severity, from a function that is allowed."""
    spaces = [function() for _ in range(4)]
    spaces[1].write(DEVCTL, 2, 4)
    spaces[2].write(DEVCTL, 2, 2)
    spaces[2].write(AER + 12, 4, 0)
    spaces[3].write(DEVCTL, 2, 4)
    assert report_to_all(spaces, Cause.MALFORMED, HEADER) == {Message.ERR_FATAL: {1, 3}, Message.ERR_NONFATAL: {2}}
    assert [(space.read(AER + 4, 4), log_of(space)) for space in spaces] == [(1 << 18, [*HEADER, 0])] * 4


@pytest.mark.parametrize("message, call", [
    ("three or four dwords, not \\[1, 2\\]", lambda space: space.report_error(Cause.MALFORMED, [1, 2])),
    ("three or four dwords, not", lambda space: space.report_error(Cause.MALFORMED, [1, 2, 1 << 32])),
    ("one that the function reports, not .*MC_BLOCKED", lambda space: plain().report_error(Uncorrectable.MC_BLOCKED)),
    ("one that the function reports, not .*LOG_OVERFLOW", lambda space: plain().report_error(Correctable.LOG_OVERFLOW)),
    ("must have a PCI Express capability", lambda space: ConfigSpace(FunctionDescription(1, 2, 3)).report_error(Cause.MALFORMED)),
])  # fmt: skip
def test_aer_parameters(message, call):
    """ERR-MODEL-8: what no function reports is refused with a sentence."""
    with pytest.raises(ValueError, match=message):
        call(function())


def plain():
    return ConfigSpace(FunctionDescription(1, 2, 3, capabilities=(pcie_capability(),), ext_capabilities=(aer_capability(),)))
