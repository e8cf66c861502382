"""Reports: run folders -> records -> tables, figures, one page. Nothing here imports torch.

pandas, matplotlib and scipy load with the module that needs them, so each is imported by its own name:
``crossft.reports.records``, ``stats``, ``tables``, ``figures``, ``page``, ``final``.
"""
