"""Reports: run folders -> records -> tables, figures, one page. Nothing here imports torch.

The heavy parts (pandas, matplotlib, scipy) load when their module is imported: ``crossft.reports.records``,
``stats``, ``tables``, ``figures``, ``page``, ``final``.
"""

__all__: list[str] = []
