"""The report of a sweep as one HTML file."""

from patcher.report.page.findings import Finding, findings
from patcher.report.page.page import render, write_report

__all__ = ["Finding", "findings", "render", "write_report"]
