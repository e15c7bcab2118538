"""The Triton kernels: one module per loss with `forward` and `backward`, as the operators of `kdops._op` expect them.

Nothing here imports the rest of kdops, and nothing but `kdops._op` imports this package: it needs triton.

launchers       NAME_loss.py, scale.py: allocate, choose the launches, enqueue; no synchronisation anywhere
kernels         cwd_forward.py, cwd_backward.py, pkd_kernels.py: device code of each pass, with the bytes it moves
                cwd_rows.py: what the passes of CWD share, the statistics of a row
tiles.py        device code that all passes share: the level table, tiles, addresses
statistics.py   device code for means and centred sums, and for combining partial ones
plan.py         which levels share a launch, the shape of a tile, how positions are split over programs

No kernel has been run on a GPU yet. All of them run in Triton's interpreter and are compiled for sm_80, sm_90 and
sm_100 by the tests; every figure of bytes and time is a prediction.
"""
