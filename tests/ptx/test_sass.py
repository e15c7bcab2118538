"""The reader of machine code, on short listings."""

import pytest

from . import sass


def function(*lines):
    """From lines such as "a:" and "LDG.E R0, [R2] ;"."""
    text = [".text.k:"]
    for i, line in enumerate(lines):
        text.append(f".L_{line}" if line.endswith(":") else f"        /*{16 * i:04x}*/    {line} ;")
    return sass.functions("\n".join(text))["k"]


def branch(label, predicate="@P0 "):
    return f"{predicate}BRA `(.L_{label})"


def load(register, width="", space="LDG.E"):
    return f"{space}{width} R{register}, desc[UR4][R2.64]"


@pytest.mark.parametrize(
    "opcode, size",
    [("LDG.E", 4), ("LDG.E.64", 8), ("LDG.E.128.CONSTANT", 16), ("LDG.E.U16", 2), ("STG.E.EF.U8", 1), ("LDS.S8", 1)],
)
def test_widths(opcode, size):
    assert sass.Instruction(opcode, "R4, [R2]").bytes == size


def test_lines_of_a_listing():
    listing = """
        .section .text.first,"ax",@progbits
first:
.text.first:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R8, desc[UR6][R118.64+0x50] ;
.L_x_0:
        /*0020*/              @UP1 EXIT ;
.text.second:
        /*0000*/                   EXIT ;
"""
    first, second = sass.functions(listing).values()
    assert [i.opcode for i in first.instructions] == ["MOV", "LDG.E.128", "EXIT"]
    assert first.labels == {".L_x_0": 2} and second.name == "second" and len(second.instructions) == 1
    assert first.instructions[1].loaded == {8, 9, 10, 11} and first.instructions[1].registers == {8, 118}


def test_a_loop_is_between_a_label_and_the_last_branch_back():
    kernel = function("a:", "NOP", branch("a"), "b:", "NOP", branch("c"), branch("b"), "NOP", branch("b"), "c:", "EXIT")
    assert kernel.loops() == [range(0, 2), range(2, 7)]


def test_the_hot_loop_is_the_one_that_loads():
    hot = [load(8, ".128"), load(12, ".128"), "FADD R0, R8, R12", branch("hot")]
    rest = [load(8), load(9), load(10), load(11), load(12), load(13), load(14), load(15), branch("rest")]
    around = ["outer:", load(20, ".128"), load(24, ".128"), "hot:", *hot, "NOP", branch("outer")]
    (loop,) = function(*around, "rest:", *rest, "EXIT").hot()
    assert [i.name for i in loop.instructions] == ["LDG", "LDG", "FADD", "BRA"]
    assert loop.loads == [16, 16] and loop.stores == []


def test_a_hot_loop_counts_without_the_loops_inside_it():
    inside = ["inner:", "STG.E [R2], R8", branch("inner")]
    (loop,) = function("a:", load(8, ".128"), *inside, "STG.E.64 [R2], R8", branch("a")).hot()
    assert [i.name for i in loop.instructions] == ["LDG", "STG", "BRA"] and loop.stores == [8]


def test_loops_that_load_alike_are_all_hot():
    def loop(label, count):
        return [f"{label}:", *(load(8, ".128", "LDS") for _ in range(count)), branch(label)]

    found = function(*loop("a", 4), *loop("b", 3), *loop("c", 2)).hot()
    assert [code.loads for code in found] == [[16] * 4, [16] * 3]


def test_single_words_in_shared_memory_are_no_data():
    (loop,) = function("a:", load(8, "", "LDS"), branch("a"), "b:", load(8), branch("b")).hot()
    assert loop.loads == [4] and loop.loads_in_flight == 1


def test_without_a_loop_that_loads_all_of_the_code_is_hot():
    (code,) = function(load(8), load(9), "FADD R0, R8, R9", "STG.E [R2], R0", "a:", branch("a", "")).hot()
    assert len(code.instructions) == 5 and code.loads_in_flight == 2


@pytest.mark.parametrize(
    "body, flight",
    [
        ([load(8), "FADD R0, R8, R0", load(9), "FADD R0, R9, R0"], 1),
        ([load(8), load(9), "FADD R0, R8, R0", "FADD R0, R9, R0"], 2),
        ([load(8, ".128"), load(12, ".128"), "FADD R0, R15, R0"], 2),  # the last register of a quad is one of the load
        ([load(8), load(9), "STG.E [R4], R8"], 2),
        ([load(8), load(9), "LDG.E R10, [R8.64]", "FADD R0, R9, R10"], 2),  # an address is a use
        ([load(8), load(9), "FADD R0, R9, R0"], 2),  # a register is waited for before it is loaded again
        ([load(8), load(9), load(10), "@P1 FADD R0, R0, -R10"], 3),
        (["FADD R0, R8, R9", load(8), load(9)], 2),  # used in the next iteration
        (["FADD R0, R1, R2"], None),
        (["LDS.128 R8, [R3]", "FADD R0, R8, R0"], None),
        (["LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64]"], None),
    ],
)
def test_loads_in_flight_before_the_first_use(body, flight):
    code = sass.Code(function(*body).instructions, repeats=True)
    assert code.loads_in_flight == flight
