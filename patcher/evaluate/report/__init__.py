"""The report of a sweep as one HTML file (needs jinja2, which the extra ``plots`` and torch bring)."""

from patcher.evaluate.report.findings import Finding, findings
from patcher.evaluate.report.page import render, write_report

__all__ = ["Finding", "findings", "render", "write_report"]
