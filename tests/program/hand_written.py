"""Two small programs, written by hand, and what editing them makes."""

from __future__ import annotations

import re

from shardstage.program import Program, parse_program

PIPELINE = """\
shardstage program 1
mesh pp=2 dp=2 tp=2
schedule 1f1b
samples global_batch=7
  dp=0 2*2
  dp=1 2 1
stages 0=pp0 1=pp1
edges
  x 0>1 grad
  mask 0>1
messages
  m0 x:float32[2,8] mask:bool[2,1]
  m1 x:float32[2,8]
  m2 x:float32[1,8] mask:bool[1,1]
  m3 x:float32[1,8]
calls
  c0 dp.all_reduce:int64[1]
  c1 2*tp.all_reduce:float32[16]
  c2 2*tp.all_reduce:float32[8]
  c3 dp.reduce_scatter:float32[64]{b0} dp.reduce_scatter:float32[10]{b1}
    tp.all_reduce:float32[5]{b1} tie0+1.all_reduce:float32[32]{b0}
  c4 world.all_reduce:float64[2] dp.all_gather:float32[64]{b0} dp.all_gather:float32[10]{b1}
  c5 dp.reduce_scatter:float32[64]{b0} dp.reduce_scatter:float32[10]{b2}
    tp.all_reduce:float32[5]{b2} tie0+1.all_reduce:float32[32]{b0}
  c6 world.all_reduce:float64[2] dp.all_gather:float32[64]{b0} dp.all_gather:float32[10]{b2}
  c7 dp.all_gather:float32[64]{b0} world.all_reduce:float64[2] dp.all_gather:float32[10]{b2}
buckets
  b0 embed.weight
  b1 first.norm
  b2 second.norm
  b3 second.table
parameters
  embed.weight stages=0,1 sum=dp,tie0+1
  first.norm stages=0 sum=dp,tp
  second.norm stages=1 sum=dp,tp
  second.table stages=1 frozen
rows
  pp=0 dp=0 tp=*
    COUNT[c0] 0F0[c1] 0SEND_F0>1(m0) 0F1[c1] 0SEND_F1>1(m0) 0RECV_B0<1(m1) 0B0[c1] 0RECV_B1<1(m1) 0B1[c1]
    REDUCE_GRAD[c3] STEP[c4]
  pp=0 dp=1 tp=*
    COUNT[c0] 0F0[c1] 0SEND_F0>1(m0) 0F1[c2] 0SEND_F1>1(m2) 0RECV_B0<1(m1) 0B0[c1] 0RECV_B1<1(m3) 0B1[c2]
    REDUCE_GRAD[c3] STEP[c4]
  pp=1 dp=0 tp=*
    COUNT[c0] 1RECV_F0<0(m0) 1F0[c1] 1I0[c1] 1SEND_B0>0(m1) 1RECV_F1<0(m0) 1F1[c1] 1I1[c1] 1SEND_B1>0(m1) 1W0 1W1
    REDUCE_GRAD[c5] STEP[c6]
  pp=1 dp=1 tp=*
    COUNT[c0] 1RECV_F0<0(m0) 1F0[c1] 1I0[c1] 1SEND_B0>0(m1) 1RECV_F1<0(m2) 1F1[c2] 1I1[c2] 1SEND_B1>0(m3) 1W0 1W1
    REDUCE_GRAD[c5] STEP[c6]
"""

SHARDED = """\
shardstage program 1
mesh pp=1 dp=2 tp=1
schedule gpipe
samples global_batch=4
  dp=* 2*1
stages 0=pp0
edges
messages
calls
  c0 dp.all_reduce:int64[1]
  c1 dp.all_gather:float32[8]{b0}
  c2 dp.all_gather:float32[64]{b1}
  c3 dp.all_gather:float32[64]{b1} dp.reduce_scatter:float32[64]{b1} dp.reduce_scatter:float32[8]{b0}
  c4 world.all_reduce:float64[2]
  c5 dp.reduce_scatter:float32[64]{b1} dp.reduce_scatter:float32[8]{b0} dp.all_gather:float32[64]{b1}
  c6 dp.all_reduce:float32[8]{b0}
buckets
  b0 embed.weight
  b1 block.weight
parameters
  embed.weight stages=0 sum=dp
  block.weight stages=0 sum=dp
rows
  pp=0 dp=* tp=*
    COUNT[c0] 0UNSHARD[c1] 0F0[c2] 0F1[c2] 0B1[c3] 0B0[c3] 0RESHARD REDUCE_GRAD STEP[c4]
"""


def edited(text: str, old: str, new: str, *, times: int = 1) -> Program:
    """The program of a text in which ``old``, which is there, became ``new``; a row or entry counts as one line."""
    lines = re.sub(r"\n {4}", " ", text)
    assert old in lines, old
    return parse_program(lines.replace(old, new, times))
