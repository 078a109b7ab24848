"""Everything people look at: log, progress, tables, metrics, and the page.

Changes nothing of a result.
"""
