"""Loops over tensors in the CPU's memory, compiled by numba for the processor at hand.

Each loop reads every input once, keeps all intermediate values in registers and writes the result once. A
loop is specialised on the number of tensors and their dtypes when it is first used (about a third of a
second), so that any mix of float32, bfloat16 and float16 is read and written without a copy. Sums that decide
something are made over fixed blocks: neither the number of threads nor the order of work changes a bit.
"""
