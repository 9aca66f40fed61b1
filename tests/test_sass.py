"""The facts of tools/sass.py on programs of a few lines, each with the order that the fact is about.

A line of a snippet is an instruction. Instructions are 16 bytes apart, so the third one is the target 0x20.
"""

import pytest

from tools import sass
from tools.sass import Facts

# 64 x 16 products: accumulators R8 to R15. The second reads R20 to R23
FIRST = "HGMMA.64x16x16.F32.BF16 R8, gdesc[UR4], R8"
LAST = "HGMMA.64x16x16.F32.BF16 R8, R20, gdesc[UR8], R8, gsb0"
# of another group: accumulators R24 to R31
OTHER = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0"
WAIT, WAIT_BUT_ONE = (f"WARPGROUP.DEPBAR.LE gsb0, {n}" for n in ("0x0", "0x1"))
BARRIER = "BAR.SYNC.DEFER_BLOCKING 0x0"
LOAD = "UTMALDG.2D [UR16], [UR8]"
EX2 = "MUFU.EX2 R40, R41"
EXIT = "EXIT"


def facts(*lines: str) -> Facts:
    listing = (
        f"        /*{16 * i:04x}*/    {line} ;    /* 0x0000000000000000 */" for i, line in enumerate(lines)
    )
    return sass.facts("\n                    /* 0x0000000000000000 */\n".join(listing))


def test_a_kernel_without_wgmma_has_no_facts():
    assert facts(WAIT, LOAD, EX2, "HMMA.16816.F32.BF16 R8, R20, R24, R8", EXIT) == Facts(0, 0, 0, 0)


# unbarred


@pytest.mark.parametrize(
    "write",
    [
        *(LOAD, "@UP0 UTMALDG.3D [UR16], [UR8]", "STS.128 [R6], R40", "STSM.16.M88.4 [R6], R40"),
        *("@!P0 LDGSTS.E.BYPASS.128 [R6], [R40.64]", "ATOMS.ADD RZ, [R6], R40"),
    ],
)
def test_a_write_after_a_wait_needs_a_barrier(write):
    assert facts(FIRST, LAST, WAIT, write, EXIT).unbarred == 1
    assert facts(FIRST, LAST, WAIT, BARRIER, write, EXIT).unbarred == 0
    assert facts(write, FIRST, LAST, WAIT, EXIT).unbarred == 0
    assert facts(FIRST, LAST, WAIT, BARRIER, OTHER, WAIT, write, EXIT).unbarred == 1


def test_a_read_of_shared_memory_needs_no_barrier():
    assert facts(FIRST, LAST, WAIT, "LDS.128 R40, [R6]", "UTMASTG.2D [UR16], [UR8]", EXIT).unbarred == 0


def test_a_barrier_of_some_warps_is_none():
    assert facts(FIRST, LAST, WAIT, "BAR.SYNC.DEFER_BLOCKING 0x1, 0x80", LOAD, EXIT).unbarred == 1


def test_a_barrier_on_one_of_two_ways_is_none():
    assert facts(FIRST, LAST, WAIT, "@P0 BRA 0x50", BARRIER, LOAD, EXIT).unbarred == 1
    # the write itself lies on the way with the barrier
    assert facts(FIRST, LAST, WAIT, "@P0 BRA 0x60", BARRIER, LOAD, EXIT).unbarred == 0


def test_the_wait_of_the_round_before_counts():
    assert facts(LOAD, FIRST, LAST, WAIT, "@P0 BRA 0x0", EXIT).unbarred == 1
    assert facts(BARRIER, LOAD, FIRST, LAST, WAIT, "@P0 BRA 0x0", EXIT).unbarred == 0


def test_no_way_leads_past_a_jump_an_exit_or_a_return():
    for end in ("BRA 0x50", EXIT, "RET.REL.NODEC R2 0x0"):
        assert facts(FIRST, LAST, WAIT, end, LOAD, EXIT).unbarred == 0
    for pass_ in ("@P0 BRA 0x50", "BRA.U UP0, 0x50", "BRA.DIV UR4, 0x50", "@!P1 EXIT", "CALL.REL.NOINC 0x50"):
        assert facts(FIRST, LAST, WAIT, pass_, LOAD, EXIT).unbarred == 1


# touched


@pytest.mark.parametrize(
    ("line", "touches"),
    [
        ("FADD R8, R40, R41", True),  # accumulators are written
        ("@P0 FADD R15, R40, R41", True),
        ("FADD R16, R40, R41", False),
        ("CS2R R7, SRZ", True),  # two registers
        ("CS2R.32 R7, SR_CLOCKLO", False),
        ("LDS.128 R5, [R6]", True),
        ("LDS.64 R6, [R6]", False),
        ("LDSM.16.M88.4 R5, [R6]", True),
        ("IMAD.WIDE R7, R40, R41, R42", True),
        ("MOV R20, R40", True),  # an input is written
        ("MOV R24, R40", False),
        ("SHFL.BFLY PT, R20, R40, 0x1, 0x1f", True),
        ("LOP3.LUT P2, R20, R40, 0x1, RZ, 0xc0, !PT", True),
        ("SHFL.BFLY PT, R40, R20, 0x1, 0x1f", False),
        ("FADD R40, R41, -R8", True),  # accumulators are read
        ("FMNMX R40, |R15|, R41, !PT", True),
        ("FADD R40, R41, R16", False),
        ("MOV R40, R20", False),  # an input may be read
        ("STS.128 [R6], R5", True),
        ("STG.E.64 [R40.64], R6", False),
        ("STG.E [R8.64], R40", True),
        ("ISETP.GE.AND P0, PT, R8, RZ, PT", True),
        ("UIADD3 UR8, UR8, 0x8, URZ", False),
        ("HGMMA.64x16x16.F32.BF16 R8, R40, gdesc[UR4], R8, gsb0", False),  # goes on with the same sum
        ("HGMMA.64x16x16.F32.BF16 R48, R12, gdesc[UR4], RZ, !UPT, gsb0", True),
    ],
)
def test_registers_of_a_product_in_flight_are_left_alone(line, touches):
    assert facts(FIRST, LAST, line, WAIT, EXIT).touched == touches
    assert facts(line, FIRST, LAST, WAIT, EXIT).touched == 0
    assert facts(FIRST, LAST, WAIT, line, WAIT, EXIT).touched == 0


def test_a_product_is_in_flight_before_its_group_ends():
    assert facts(FIRST, "MOV R8, R40", LAST, WAIT, EXIT).touched == 1


def test_a_wait_may_leave_the_youngest_group_in_flight():
    ways = {
        "MOV R8, R40": 0,  # of the older group
        "MOV R24, R40": 1,
    }
    for line, touched in ways.items():
        assert facts(FIRST, LAST, OTHER, WAIT_BUT_ONE, line, WAIT, EXIT).touched == touched
    # a group that has not ended is not waited for
    assert facts(OTHER, FIRST, WAIT, "MOV R24, R40", "MOV R8, R40", LAST, WAIT, EXIT).touched == 1


def test_a_product_of_the_round_before_is_in_flight():
    assert facts("MOV R8, R40", FIRST, LAST, "@P0 BRA 0x0", WAIT, EXIT).touched == 1
    assert facts("MOV R8, R40", FIRST, LAST, WAIT, "@P0 BRA 0x0", EXIT).touched == 0


def test_of_two_ways_the_one_with_the_younger_product_counts():
    rest = (WAIT_BUT_ONE, "MOV R8, R40", WAIT, EXIT)
    assert facts(LAST, "@P0 BRA 0x30", OTHER, *rest).touched == 1
    assert facts(LAST, "@P0 BRA 0x30", "BRA 0x40", OTHER, *rest).touched == 1
    assert facts(LAST, "NOP", "NOP", OTHER, *rest).touched == 0


def test_an_unknown_shape_is_an_error():
    with pytest.raises(AssertionError, match="HGMMA of an unknown shape: HGMMA.SP"):
        facts("HGMMA.SP.64x16x32 R8, gdesc[UR4], R8, gsb0", EXIT)


# overlap


def test_overlap_counts_exponentials_while_a_product_is_in_flight():
    assert facts(EX2, FIRST, EX2, EX2, LAST, WAIT, EX2, EXIT).overlap == 2
    assert facts(EX2, FIRST, LAST, EX2, WAIT, EX2, EXIT).overlap == 1
    assert facts(FIRST, "MUFU.RCP R40, R41", LAST, WAIT, EXIT).overlap == 0
    assert facts(EX2, FIRST, LAST, "@P0 BRA 0x0", WAIT, EXIT).overlap == 1


# mixed

# reads R20 to R23, as LAST does
READ = "HGMMA.64x16x16.F32.BF16 R24, R20, gdesc[UR4], RZ, !UPT, gsb0"
QUERIES, PACK = "LDSM.16.M88.4 R20, [R6]", "F2FP.BF16.F32.PACK_AB R21, R41, R40"


@pytest.mark.parametrize(
    "written",
    [PACK, "HGMMA.64x16x16.F32.BF16 R16, gdesc[UR4], RZ, !UPT, gsb0", "LDS.64 R22, [R6]", "MOV R23, RZ"]
    + ["SHFL.BFLY PT, R21, R40, 0x1, 0x1f"],
)
def test_queries_that_a_round_overwrites_are_mixed(written):
    """As ptxas 12.8 compiles a loop whose products have left operands of one size."""
    assert facts(QUERIES, READ, WAIT, written, "@P0 BRA 0x10", EXIT).mixed == 1
    # each round loads them again
    assert facts(QUERIES, READ, WAIT, written, "@P0 BRA 0x0", EXIT).mixed == 0
    assert facts(QUERIES, READ, WAIT, "@P0 BRA 0x10", written, EXIT).mixed == 0


def test_an_operand_of_one_origin_is_not_mixed():
    assert facts(QUERIES, READ, WAIT, "MOV R24, RZ", "STS.128 [R6], R20", "@P0 BRA 0x10", EXIT).mixed == 0
    # pieces of one operand may come from several instructions
    assert facts(QUERIES, PACK, READ, WAIT, "@P0 BRA 0x20", EXIT).mixed == 0


def test_both_sides_of_a_predicate_are_origins():
    assert facts(QUERIES, f"@P0 {PACK}", READ, WAIT, EXIT).mixed == 1
    assert facts("@P0 BRA 0x20", QUERIES, READ, WAIT, EXIT).mixed == 0
    assert facts("@P0 BRA 0x30", QUERIES, "BRA 0x40", PACK, READ, WAIT, EXIT).mixed == 1
    assert facts(QUERIES, "@P0 BRA 0x30", PACK, READ, WAIT, EXIT).mixed == 1
