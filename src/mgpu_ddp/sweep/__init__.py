"""Many jobs → an answer: a table, a plot and a page.

Knows nothing of how a job works.
"""
