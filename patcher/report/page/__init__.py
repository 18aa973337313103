"""The report of a sweep as one HTML file (needs jinja2, which the extra ``plots`` and torch bring)."""

from patcher.report.page.findings import Finding, findings
from patcher.report.page.page import render, write_report

__all__ = ["Finding", "findings", "render", "write_report"]
