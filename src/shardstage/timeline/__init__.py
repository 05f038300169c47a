"""When each rank does what, and how much memory it holds: predicted by the simulator or measured by the engine, in the same words.

Owns ``Timeline``, its file, and its export to Chrome's trace viewer and Perfetto. In go spans and samples of memory, out come questions
answered (how long, how idle, how full). It refuses to know how they were obtained, and runs without torch.
"""

from shardstage.timeline.timeline import STREAMS, MemorySample, Span, Stream, Timeline

__all__ = ["STREAMS", "MemorySample", "Span", "Stream", "Timeline"]
