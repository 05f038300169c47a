"""What a run or a rehearsal was, for people: one page that opens from disk, and the same in the terminal.

Owns the page, its drawing, and the text. In go timelines, predicted and measured, and a few lines on what ran; out come an HTML file that
needs no network, and lines of 80 columns. It refuses to know where the timelines come from.
"""

from shardstage.report.about import About, RankNote
from shardstage.report.page import page_style, report_page, write_report
from shardstage.report.text import report_text

__all__ = ["About", "RankNote", "page_style", "report_page", "report_text", "write_report"]
