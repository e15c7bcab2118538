"""The Triton kernels: one module per loss with `forward` and `backward`, as the operators of `kdops._op` expect them.

This package needs triton. It imports nothing else of kdops, and only `kdops._op` imports it.

launchers       NAME_loss.py, scale.py: allocate, choose the launches, enqueue; no host synchronization
kernels         cwd_forward.py, cwd_backward.py, pkd_kernels.py: device code of each pass, with the bytes it moves
                cwd_rows.py: the statistics of a row, shared by the passes of CWD
tiles.py        device code that all passes share: the level table, tiles, addresses
statistics.py   device code for means and centred sums, and for combining partial ones
plan.py         which levels share a launch, the shape of a tile, how positions are split over programs

The tests run all kernels in Triton's interpreter and as PTX, and compile them for sm_80, sm_90 and sm_100. Figures of
bytes in these modules are counted, not measured (status: DESIGN.md).
"""
